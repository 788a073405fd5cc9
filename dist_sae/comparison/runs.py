"""Settings, evaluations and histories of several runs, read from their folders."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dist_sae.checkpoint.trained import find_checkpoint, trained_run
from dist_sae.config import Run
from dist_sae.config.fingerprint import PLAN_SECTIONS, run_fingerprint
from dist_sae.evaluation.facts import evaluation_key, read_evaluation, training_seconds
from dist_sae.report.outcome import Outcome, read_outcomes
from dist_sae.storage import open_store
from dist_sae.telemetry.history import read_history
from dist_sae.telemetry.metrics import listed

NUMBERS = {
    "step": "Step",
    "trained_rows": "Rows trained",
    **{metric.short: metric.title for metric in listed("card")},
    "duplicate_share": "Duplicates",
    "rows_per_second": "Rows/s in training",
}
"""Columns of the table with their headings. All but the first two and the last come from the
evaluation."""
_HELD_OUT = ("plan", "rows", "site")
"""Keys of an evaluation that decide its rows. Evaluations with equal values measure the same
rows."""


class Compared(NamedTuple):
    """One of the compared runs."""

    label: str
    """Name of the run. If several runs have the same name, the store of runs comes before it."""
    run: Run
    settings: Mapping[str, Any]
    """Settings that decide the run's result, by `section.key`."""
    step: int | None
    """Step of the newest checkpoint. None if there is no checkpoint."""
    checkpoint: str | None
    """Digest of the newest checkpoint. None if there is no checkpoint."""
    evaluation: Mapping[str, Any]
    """Held-out results. Empty if there are none."""
    history: Sequence[Mapping[str, Any]]
    """Training records, one per step."""

    @property
    def numbers(self) -> dict[str, Any]:
        """Values of `NUMBERS` by name. None for unknown values."""
        seconds = training_seconds(self.history, self.step or 0)
        trained = None if self.step is None else self.step * self.run.train.batch_rows
        speed = trained / seconds if trained and seconds else None
        own = {"step": self.step, "trained_rows": trained, "rows_per_second": speed}
        return {name: own.get(name, self.evaluation.get(name)) for name in NUMBERS}

    @property
    def command(self) -> str:
        """The run's folder, as an argument for commands."""
        return f"{self.run.store.runs}/{self.run.name}"


def read_compared(runs: Sequence[Run]) -> list[Compared]:
    """Read the results that each run has so far.

    Raises:
        PlanMismatchError: A run file differs from the run that was trained with it.
        StoreError: A store cannot be read.
    """
    names = Counter(run.name for run in runs)
    return [_read(run, alone=names[run.name] == 1) for run in runs]


def _read(run: Run, *, alone: bool) -> Compared:
    store = open_store(run.store.runs, run.store.s3)
    checkpoint = find_checkpoint(store, run, None)
    own = run if checkpoint is None else trained_run(checkpoint, run)
    return Compared(
        run.name if alone else f"{run.store.runs}/{run.name}",
        own,
        dict(_flat(run_fingerprint(own))),
        None if checkpoint is None else checkpoint.step,
        None if checkpoint is None else checkpoint.digest,
        read_evaluation(store, evaluation_key(run.name)) or {},
        read_history(store, run.name),
    )


def joint_outcomes(name: str, compared: Sequence[Compared]) -> list[Outcome]:
    """Read outcomes of `dist-sae analyse` for the newest checkpoints of several runs together.

    Args:
        name: Name of the first run or sweep, whose folder contains the outcomes.
        compared: The runs.

    Raises:
        CorruptObjectError: An outcome is damaged.
    """
    first = compared[0].run
    there = read_outcomes(open_store(first.store.runs, first.store.s3), name)
    newest = {each.run.name: each.checkpoint for each in compared}.items()
    return [
        each for each in there if len(each.checkpoints) > 1 and each.checkpoints.items() <= newest
    ]


def differing(compared: Sequence[Compared]) -> dict[str, list[Any]]:
    """Return the settings that differ between runs, with the values in the runs' order.

    The value is None for a run whose recipe does not have the setting. Names are ignored.
    """
    keys = dict.fromkeys(key for each in compared for key in each.settings)
    values = {key: [each.settings.get(key) for each in compared] for key in keys if key != "name"}
    return {key: of_runs for key, of_runs in values.items() if len(set(map(str, of_runs))) > 1}


def caveats(compared: Sequence[Compared]) -> list[str]:
    """Return the reasons why numbers are not directly comparable, one sentence each."""
    found = []
    for each in compared:
        if each.step is None:
            found.append(f"{each.label}: has no checkpoint yet.")
        elif not each.evaluation:
            found.append(
                f"{each.label}: has not been evaluated; run dist-sae evaluate {each.command}."
            )
        elif each.evaluation["step"] != each.step:
            of, newest = each.evaluation["step"], each.step
            remedy = f"run dist-sae evaluate {each.command}"
            found.append(f"{each.label}: was evaluated at step {of:,} of {newest:,}; {remedy}.")
    groups: dict[tuple[Any, ...], list[str]] = {}
    for each in compared:
        if each.evaluation:
            rows = tuple(each.evaluation.get(name) for name in _HELD_OUT)
            groups.setdefault(rows, []).append(each.label)
    if len(groups) > 1:
        sets = (
            f"{', '.join(labels)} on {rows:,} rows of {site} (plan {plan[:8]})"
            for (plan, rows, site), labels in groups.items()
        )
        found.append(f"Held-out numbers were measured on different rows: {'; '.join(sets)}.")
    return found


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in settings.items():
        # the plan covers text and model, so these sections are compared as a whole
        if isinstance(value, Mapping) and key not in PLAN_SECTIONS:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
