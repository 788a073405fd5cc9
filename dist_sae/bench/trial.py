"""`dist-sae estimate --measure`: a short version of the planned run, by the real commands.

This trial has the recipe, ranks and batches of the run, but fewer steps. The schedules of learning
rate, sparsity and k, and `dead_after_rows`, are scaled to the same share of the trial as of the
run. So latents die in the trial, and penalized recipes reach their target L0. The trial produces
only a few rows and trains on them several times.
"""

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from dist_sae.config import Run, dump_run, sections_of, validate_run, with_absolute_paths
from dist_sae.data.corpus import Corpus
from dist_sae.data.shard import MANIFESTS, read_manifest
from dist_sae.errors import ConfigError, ProcessFailedError
from dist_sae.planning.rates import Rates
from dist_sae.planning.sizes import RunSizes
from dist_sae.storage import open_store
from dist_sae.telemetry.history import read_history
from dist_sae.telemetry.metric import NON_STEP_PHASES

_PASSES = 4  # passes over the rows of the trial
_WINDOWS = 16  # windows of steps, each with one record in the history
_SPARE = 1.2  # extra rows: their number is an estimate, and a pass ends with the shortest stream
_LEAST_DOCUMENTS = 64
_LEAST_DEAD_SHARE = 0.25  # of the trial: with a shorter time, rare latents would count as dead


def trial(run: Run, groups: Sequence[Sequence[RunSizes]], steps: int) -> Rates:
    """Run a short version of this run, and return the rates that it measured.

    Args:
        run: The run, or a sweep.
        groups: The run's jobs; jobs that share ranks are in one group.
        steps: Steps of the trial.

    Raises:
        ConfigError: This machine has fewer cores than the run has ranks.
        ProcessFailedError: A command of the trial failed.
    """
    processes = run.processes
    ranks, cores = max(processes.trainers, run.tensor_parallel), os.cpu_count() or 1
    if ranks > cores:
        raise ConfigError(
            f"--measure: {ranks} ranks need {ranks} cores, and this machine has {cores}; use "
            f"--bench with the output of `bench step` and `bench produce`, or --accelerator"
        )
    at_once = processes.producers * run.tensor_parallel + processes.trainers
    threads = str(processes.threads or max(1, cores // at_once))
    environment = {"OMP_NUM_THREADS": threads} | os.environ
    with tempfile.TemporaryDirectory(prefix="dist-sae-trial-") as folder:
        short = trial_run(run, groups, steps, folder)
        path = Path(folder, "run.yaml")
        path.write_text(dump_run(with_absolute_paths(short)), encoding="utf-8")

        def seconds(command: str, ranks: int = 1) -> float:
            options = ["--local-ranks", str(ranks)] if ranks > 1 else []
            return _timed([command, str(path), *options], environment)

        seconds("plan")
        producing = seconds("produce", run.tensor_parallel)
        rate, rows = _producer_rate(short)
        training = seconds("train", processes.trainers)
        runs = open_store(short.store.runs)
        of_job = {job.run.name: read_history(runs, job.run.name) for job in chain(*groups)}
    spent = [
        [step_and_total_seconds(of_job[job.run.name], _dead_share(job)) for job in group]
        for group in groups
    ]
    step, worked = max(tuple(map(sum, zip(*group, strict=True))) for group in spent)
    dead = max(record.get("dead_share", 0.0) for record in chain(*of_job.values()))
    return Rates(
        step,
        rate,
        trainer_begin_seconds=max(0.0, training - worked),
        producer_begin_seconds=max(0.0, producing - rows / rate),
        sources=(
            f"{steps} steps of a short version of this run, and a producer, measured here; up to "
            f"{dead:.0%} of the latents were dead, and steps are slower if more are",
        ),
    )


def trial_run(run: Run, groups: Sequence[Sequence[RunSizes]], steps: int, folder: str) -> Run:
    """Return the run of the trial: the same run with `steps` steps and its stores in `folder`."""
    jobs = list(chain.from_iterable(groups))
    sections, trained = sections_of(run), steps * run.train.batch_rows
    sections["store"] |= {
        "activations": f"{folder}/activations",
        "runs": f"{folder}/runs",
        "retention": "keep",
        "max_ahead_units": None,
    }
    rows = math.ceil(trained / _PASSES)
    sections["corpus"] |= _documents(run, jobs[0], rows)
    sections["activations"] |= {"streams": None, "unit_rows": None}
    sections["train"] |= {"normaliser_rows": None, "max_passes": 2 * _PASSES, "parent": None}
    sections["processes"] = sections.get("processes", {}) | {"producers": 1}
    for section in ("telemetry", "evaluate", "index"):
        sections.pop(section, None)
    own = {job.run.name: _job_settings(job, steps) for job in jobs}
    if run.sweep is None:
        for key, value in own[run.name].items():
            section, name = key.split(".")
            sections[section][name] = value
    else:
        sections["sweep"] = {
            "placement": run.sweep.placement,
            "jobs": {
                name: overrides | own[f"{run.name}-{name}"]
                for name, overrides in run.sweep.overrides().items()
            },
        }
    return validate_run(sections, "--measure")


def _job_settings(job: RunSizes, steps: int) -> dict[str, Any]:
    """Return the settings of a job, by key, that differ in the trial."""
    run, trained = job.run, steps * job.run.train.batch_rows
    settings: dict[str, Any] = {
        "train.rows": trained,
        "train.warmup_steps": round(run.train.warmup_steps * steps / run.steps),
        "train.log_every_steps": max(1, steps // _WINDOWS),
        "train.save_every_steps": steps,
        "train.keep_every_steps": None,
        "train.keep_best": 0,
        "sae.dead_after_rows": round(max(_dead_share(job), _LEAST_DEAD_SHARE) * trained),
    }
    if run.sae.init_rows > trained:
        settings["sae.init"] = "random"
    return settings


def _dead_share(job: RunSizes) -> float:
    """Return the share of the run before the first latent can be dead."""
    return min(1.0, job.run.dead_after_rows / job.run.rows)


def _documents(run: Run, job: RunSizes, rows: int) -> dict[str, int]:
    """Return the corpus setting that gives about `rows` rows for training."""
    wanted = _SPARE * rows / (1 - run.activations.heldout_share)
    if run.corpus.kind == "synthetic":
        return {"documents": max(_LEAST_DOCUMENTS, math.ceil(wanted / run.corpus.document_rows))}
    there = sum(span.count for span in Corpus(run.corpus, run.store.s3).index().spans)
    there = min(there, run.corpus.max_documents or there)
    documents = math.ceil(there * wanted / sum(job.units))
    return {"max_documents": min(there, max(_LEAST_DOCUMENTS, documents))}


def _producer_rate(short: Run) -> tuple[float, int]:
    """Return the rows per second between the first finished unit and the last, and all rows."""
    store = open_store(short.store.activations)
    ages = MANIFESTS.ages(store)
    rows = {unit: read_manifest(store, unit).rows for unit in ages}
    first = max(ages, key=lambda unit: ages[unit])
    seconds = max(ages.values()) - min(ages.values())
    return (sum(rows.values()) - rows[first]) / seconds, sum(rows.values())


def step_and_total_seconds(
    records: Sequence[Mapping[str, Any]], dead_share: float
) -> tuple[float, float]:
    """Return the mean step time of the run, and the time of all steps of the trial, in seconds.

    The measured time of the first record's steps is ignored, because they also map memory and load
    code lazily. They are counted at the mean step time instead.

    Args:
        records: The trial's history.
        dead_share: Share of the run before the first latent can be dead.
    """
    records = [record for record in records if "phases" in record]
    ends = [record["step"] for record in records]
    counts = [end - before for before, end in pairwise([0, *ends])]
    seconds = [
        sum(spent for phase, spent in record["phases"].items() if phase not in NON_STEP_PHASES)
        for record in records
    ]

    def mean(first: float, last: float) -> float:
        """Return the mean step time from step `first` to `last`; of all steps if there are none."""
        there = range(1, len(ends))
        chosen = [i for i in there if first <= ends[i] - counts[i] and ends[i] <= last] or there
        return float(sum(seconds[i] for i in chosen) / sum(counts[i] for i in chosen))

    dead_from = max(dead_share, _LEAST_DEAD_SHARE) * ends[-1]
    step = dead_share * mean(0, dead_from) + (1 - dead_share) * mean(dead_from, ends[-1])
    return step, sum(seconds[1:]) + mean(0, ends[-1]) * counts[0]


def _timed(arguments: Sequence[str], environment: Mapping[str, str]) -> float:
    """Run a dist-sae command. Returns its seconds."""
    since = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "dist_sae", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip() or "no output").splitlines()[-1]
        reason = last.removeprefix("error: ")
        raise ProcessFailedError(f"--measure: {arguments[0]}: {reason}", done.returncode)
    return time.perf_counter() - since
