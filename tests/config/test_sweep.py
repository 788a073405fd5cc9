"""The jobs of a sweep, and the sweeps that are refused."""

from pathlib import Path
from typing import Any

import pytest

from dist_sae.config import dump_run, groups_of, jobs_of, load_run
from dist_sae.config.fingerprint import run_fingerprint
from dist_sae.errors import ConfigError
from tests.runs import write_run


def test_every_combination_of_values_is_a_run_of_its_own(tmp_path: Path) -> None:
    """Defaults are derived from the job's settings, e.g. a learning rate of 2e-4 for 16,384
    latents.
    """
    over = {
        "sae.n_latents": {"first": 1024, "last": 16384, "times": 4},
        "train.seed": {"first": 0, "last": 1, "plus": 1},
    }
    run = load_run(
        write_run(tmp_path, sweep={"over": over}, train={"lr": None}, sae={"init": "random"})
    )
    jobs = jobs_of(run)
    assert [job.name for job in jobs] == [
        f"world-n-latents{n}-seed{seed}" for n in (1024, 4096, 16384) for seed in (0, 1)
    ]
    assert [job.train.lr for job in jobs[::2]] == pytest.approx([8e-4, 4e-4, 2e-4])
    assert all(job.sweep is None and job.sae.kind == "topk" for job in jobs)


def test_a_sweep_may_be_given_on_the_command_line(tmp_path: Path) -> None:
    """A key below `sweep.over` or `sweep.jobs.NAME` may contain dots."""
    sets = ["sweep.over.sae.k=[2, 3]", "sweep.jobs.fast.train.lr=0.01"]
    found = jobs_of(load_run(write_run(tmp_path), sets))
    assert {job.name: (job.sae.model_dump()["k"], job.train.lr) for job in found} == {
        "world-fast-k2": (2, 0.01),
        "world-fast-k3": (3, 0.01),
    }


def test_named_jobs_are_trained_with_each_value(tmp_path: Path) -> None:
    jobs = {"wide": {"sae.n_latents": 128}, "relu": {"sae": {"kind": "relu", "n_latents": 32}}}
    sweep = {"jobs": jobs, "over": {"train.lr": [1e-3, 0.02]}}
    found = jobs_of(load_run(write_run(tmp_path, sweep=sweep)))
    assert {job.name: (job.sae.kind, job.sae.n_latents, job.train.lr) for job in found} == {
        "world-wide-lr0.001": ("topk", 128, 1e-3),
        "world-wide-lr0.02": ("topk", 128, 0.02),
        "world-relu-lr0.001": ("relu", 32, 1e-3),
        "world-relu-lr0.02": ("relu", 32, 0.02),
    }


def test_a_job_is_the_run_that_a_file_of_its_own_gives(tmp_path: Path) -> None:
    """This is also true of a sweep that was written and read again, as in a ConfigMap."""
    sweep = {"over": {"sae.k": [2], "sae.kind": ["batchtopk"]}}
    run = load_run(write_run(tmp_path, sweep=sweep))
    own = load_run(
        write_run(tmp_path, name="world-k2-batchtopk", sae={"k": 2}), ["sae.kind=batchtopk"]
    )
    path = tmp_path / "again.yaml"
    path.write_text(dump_run(run))
    assert jobs_of(run) == jobs_of(load_run(path)) == (own,)
    assert run_fingerprint(jobs_of(run)[0]) == run_fingerprint(own)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (
            {"over": {"sae.k": [2, 2]}},
            "sweep: two jobs are named k2; remove or rename one of them",
        ),
        (
            {"jobs": {"a": {"train": {"lr": 1e-3}}}},
            "sweep.jobs.a.train: set individual keys of train, such as train.lr",
        ),
        (
            {"over": {"train.batch_rows": [320, 640]}},
            "sweep.over.train.batch_rows: train.batch_rows is the same for all jobs: all jobs read "
            "the same batches",
        ),
        (
            {"jobs": {"a": {"train.parent.run": "old"}}},
            "sweep.jobs.a.train.parent.run: train.parent.run is the same for all jobs: all jobs "
            "start at the same place in the stream",
        ),
        (
            {"jobs": {"a": {"corpus.documents": 4}}},
            "sweep.jobs.a.corpus.documents: corpus.documents is the same for all jobs; they may "
            "differ in sae, sae.*, train.* and processes.latent_shards, and anything else needs a "
            "separate run file",
        ),
        (
            {"jobs": {"a": {"sae.k": 2}}, "over": {"sae.k": [3]}},
            "sweep: sae.k is in both jobs and over; leave one of them out",
        ),
        ({"over": {"sae.k": [2, 65]}}, "sweep: k65: sae: k (65) must not exceed n_latents (64)"),
        ({"over": {"sae.kk": [2]}}, "sweep: kk2: sae.kk: unknown key; did you mean k?"),
        (
            {"over": {"sae.k": {"first": 3, "last": 5}}},
            "sweep.over.sae.k: a range needs first, a last that is not below it, and either "
            "plus or times",
        ),
        (
            {"over": {"sae.k": 3}},
            "sweep.over.sae.k: give a list of values, or {first: 16, last: 128, times: 2}, or "
            "{first: 0, last: 7, plus: 1}",
        ),
        ({}, "sweep: no jobs: set jobs or over"),
        (
            {"jobs": {"A": {}}},
            "sweep.jobs.A: use lower-case letters, digits, '-' and '.', and start and end with a "
            "letter or a digit (got 'A')",
        ),
        (
            {"jobs": {"a" * 48: {}}},
            f"sweep: {'a' * 48}: name: use at most 52 lower-case letters, digits, '-' and '.', "
            f"and start and end with a letter or a digit (got 'world-{'a' * 48}')",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(
    tmp_path: Path, sweep: dict[str, Any], message: str
) -> None:
    path = write_run(tmp_path, sweep=sweep)
    with pytest.raises(ConfigError) as raised:
        load_run(path)
    assert str(raised.value) == f"{path}: {message}"


def test_two_jobs_of_one_name_are_refused(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    path.write_text(path.read_text() + "sweep: {jobs: {a: {}, a: {sae.k: 2}}}\n")
    with pytest.raises(ConfigError, match="key 'a' appears twice"):
        load_run(path)


def test_an_override_that_jobs_would_undo_is_refused(tmp_path: Path) -> None:
    path = write_run(tmp_path, sweep={"over": {"sae.k": [2, 4]}})
    assert load_run(path, ["sae.n_latents=128"]).sae.n_latents == 128
    with pytest.raises(ConfigError) as raised:
        load_run(path, ["sae.k=8"])
    assert str(raised.value) == (
        f"--set sae.k=8: the sweep's jobs set sae.k themselves; change it in {path}"
    )


def spread(folder: Path, n_jobs: int, trainers: int, **own: Any) -> list[list[str]]:
    """Return each group's jobs, each with its number of ranks."""
    jobs = {f"j{number}": {"train.seed": number, **own} for number in range(n_jobs)}
    pods = {"trainer": {"ranks": 4, "gpus": 4}} if trainers % 4 == 0 else {}
    run = load_run(
        write_run(
            folder,
            sweep={"placement": "spread", "jobs": jobs},
            processes={"trainers": trainers},
            cluster=pods,
        )
    )
    return [[f"{job.name[6:]}x{job.processes.trainers}" for job in g] for g in groups_of(run)]


def test_ranks_are_spread_over_jobs(tmp_path: Path) -> None:
    """There are as many groups as jobs or as ranks allow. A group has all shards of a job."""
    assert spread(tmp_path, 2, 4) == [["j0x2"], ["j1x2"]]
    assert spread(tmp_path, 5, 2) == [["j0x1", "j2x1", "j4x1"], ["j1x1", "j3x1"]]
    cut = {"processes.latent_shards": 2}
    assert spread(tmp_path, 3, 4, **cut) == [["j0x2", "j2x2"], ["j1x2"]]


def test_ranks_that_cannot_be_spread_evenly_are_refused(tmp_path: Path) -> None:
    said = (
        r"4 ranks \(processes.trainers\) cannot be spread evenly over 3 groups.* use 3 or 6 ranks"
    )
    with pytest.raises(ConfigError, match=said):
        spread(tmp_path, 3, 4)
