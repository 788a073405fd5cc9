"""Several dictionaries trained from one stream equal those that each run trains alone."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import dist_sae.training.batches
from dist_sae.checkpoint.layout import Checkpoint, Checkpoints
from dist_sae.config import Run, jobs_of, load_run
from dist_sae.data.consumers import Consumers
from dist_sae.data.shard import CLAIMS, manifest_key
from dist_sae.distributed.mesh import join_mesh
from dist_sae.distributed.rendezvous import Ranks
from dist_sae.distributed.watch import Watch
from dist_sae.errors import ConfigError, NonFiniteError, Stopped
from dist_sae.storage import open_store
from dist_sae.storage.local import LocalStore
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.telemetry.history import read_history
from dist_sae.telemetry.scrape import read_page
from dist_sae.training import memory
from dist_sae.training.loop import train
from tests.forks import HANG_SECONDS
from tests.launch import start_ranks
from tests.launch import train as train_ranks
from tests.training.trained import STEPS, check_same, run_file

pytestmark = pytest.mark.system

RANKS = Ranks(0, 1, 0, ("here",))
JOBS: dict[str, dict[str, Any]] = {
    "topk": {},
    "wide": {"sae": {"kind": "batchtopk", "n_latents": 96, "k": 4, "dead_after_rows": 480}},
    "relu": {"sae": {"kind": "relu", "n_latents": 40}, "train.lr": 1e-3, "train.seed": 7},
    "routed": {"sae": {"kind": "routed", "n_latents": 64, "k": 3, "experts": 4}},
    "mean": {"train.ema_decay": 0.9, "train.log_every_steps": 7, "train.save_every_steps": 13},
    "short": {"train.rows": 3200, "sae.k_start": 8},
}


OF_THREE: dict[str, dict[str, Any]] = {"a": {}, "b": {"sae.k": 2}, "c": {"sae.n_latents": 32}}


class StopAt(Watch):
    """A watch that requests a stop when the rank is at a step.

    The stop takes effect after the next step.
    """

    def __init__(self, stopping: threading.Event, step: int | None) -> None:
        super().__init__(RANKS, stopping, lost_seconds=60, hung_seconds=60)
        self.asked, self.step = stopping, step

    def set_step(self, step: int, *, working: bool) -> None:
        super().set_step(step, working=working)
        if step == self.step:
            self.asked.set()


def sweep_file(folder: Path, activations: str, jobs: dict[str, Any], **sections: Any) -> Path:
    return run_file(folder, activations, sweep={"jobs": jobs}, **sections)


def open_telemetry(run: Run) -> Telemetry:
    return Telemetry(run.name, "train", None, jobs=[job.name for job in jobs_of(run)])


def train_here(
    run: Run, stop_at: int | None = None, telemetry: Telemetry | None = None
) -> tuple[dict[str, Any], str]:
    """Train in this process, and return the results and the metrics page."""
    stopping, telemetry = threading.Event(), telemetry or open_telemetry(run)
    with StopAt(stopping, stop_at) as watch, join_mesh(RANKS) as mesh:
        found = train(run, mesh, watch, stopping, telemetry)
    return found, telemetry.render().decode()


def checkpoint_of(folder: Path, run: str) -> Checkpoint:
    newest = Checkpoints(open_store(str(folder / "runs")), run, 2).latest()
    assert newest is not None
    return newest


def bytes_read(page: str, run: str) -> float:
    samples = [sample for sample in read_page(page) if sample.name == "dist_sae_store_bytes_total"]
    return sum(s.value for s in samples if (s.labels["run"], s.labels["direction"]) == (run, "in"))


def check_alike(alone: Path, sweep: Path, run: str) -> None:
    """Check that weights, moments, counts and numbers are the same bit for bit."""
    one, other = (checkpoint_of(folder, run) for folder in (alone, sweep))
    assert (one.step, one.scalars) == (other.step, other.scalars)
    check_same(one, other)
    here, there = (read_history(open_store(str(f / "runs")), run) for f in (alone, sweep))
    names = ("step", "fvu", "gradient_norm", "dead_share", "learning_rate")
    assert [[r.get(n) for n in names] for r in here] == [[r.get(n) for n in names] for r in there]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, activations: str) -> Path:
    """The folder in which each job was trained alone."""
    folder = tmp_path_factory.mktemp("alone")
    for job in jobs_of(load_run(sweep_file(folder, activations, JOBS))):
        train_here(job)
    return folder


def test_a_sweep_trains_what_each_job_trains_alone(
    tmp_path: Path, activations: str, alone: Path
) -> None:
    """The sweep is stopped twice, the second time at one job's last step.

    A job is added in between.

    The added job starts at step 0, and the others wait until it has caught up.
    """
    first = {name: own for name, own in JOBS.items() if name != "relu"}
    with pytest.raises(Stopped, match="stopped at step 9 of 60"):
        train_here(load_run(sweep_file(tmp_path, activations, first)), stop_at=8)
    run = load_run(sweep_file(tmp_path, activations, JOBS))
    with pytest.raises(Stopped, match="stopped at step 20 of 60"):
        train_here(run, stop_at=19)
    assert {checkpoint_of(tmp_path, f"world-{name}").step for name in JOBS} == {20}
    found, _ = train_here(run)
    assert {name: result["step"] for name, result in found.items()} == {
        f"world-{name}": 20 if name == "short" else STEPS for name in JOBS
    }
    for name in JOBS:
        check_alike(alone, tmp_path, f"world-{name}")
    assert train_here(run)[0].keys() == found.keys()  # all jobs are complete, so nothing is built


def test_a_batch_is_read_once_for_all_jobs(tmp_path: Path, activations: str) -> None:
    """Each job has its own series, phases and consumer."""
    one, three = (
        train_here(load_run(sweep_file(tmp_path / str(len(jobs)), activations, jobs)))[1]
        for jobs in ({"a": OF_THREE["a"]}, OF_THREE)
    )
    assert 0 < bytes_read(three, "world-a") < 1.1 * bytes_read(one, "world-a")
    for name in "abc":
        series = f'dist_sae_train_rows_total{{rank="0",role="train",run="world-{name}"}} 9600.0'
        assert series in three
    history = read_history(open_store(str(tmp_path / "3" / "runs")), "world-b")
    assert all(record["phases"]["others"] > 0 for record in history[1:])
    done = {c.run: c.needed for c, _ in Consumers(open_store(activations), 1.0).all()}
    assert {done[f"world-{name}"] for name in "abc"} == {16}


@pytest.mark.parametrize("jobs", [{"a": {}}, OF_THREE])
def test_no_block_is_read_twice(
    tmp_path: Path, activations: str, monkeypatch: pytest.MonkeyPatch, jobs: dict[str, Any]
) -> None:
    """Initial values come from the first batches of training, however many jobs there are."""
    read, get = Counter[tuple[str, int]](), LocalStore.get

    def counted(self: LocalStore, key: str, start: int = 0, stop: int | None = None) -> bytes:
        read[key, start] += key.startswith("shards/")
        return get(self, key, start, stop)

    monkeypatch.setattr(LocalStore, "get", counted)
    train_here(load_run(sweep_file(tmp_path, activations, jobs, train={"rows": 1600})))
    assert {n for (key, _), n in read.items() if key.startswith("shards/")} == {1}


def test_first_batches_that_are_not_kept_are_read_again(
    tmp_path: Path, activations: str, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dictionary is the same as with cached batches."""
    monkeypatch.setattr(dist_sae.training.batches, "KEPT_BYTES", 0)
    (job,) = jobs_of(load_run(sweep_file(tmp_path, activations, {"topk": JOBS["topk"]})))
    train_here(job)
    check_alike(alone, tmp_path, "world-topk")


def test_a_job_that_diverges_ends_and_the_others_go_on(
    tmp_path: Path, activations: str, alone: Path
) -> None:
    jobs = {"topk": {}, "wild": {"train.lr": 1e37, "train.clip_norm": None}, "wide": JOBS["wide"]}
    run = load_run(sweep_file(tmp_path, activations, jobs))
    telemetry = open_telemetry(run)
    with pytest.raises(NonFiniteError) as raised, telemetry:
        train_here(run, telemetry=telemetry)
    page = telemetry.render().decode()
    ended = [s for s in read_page(page) if s.name.startswith("dist_sae_run_f") and s.value]
    assert {(s.labels["run"], s.name) for s in ended} == {
        ("world-topk", "dist_sae_run_finished"),
        ("world-wild", "dist_sae_run_failed"),
        ("world-wide", "dist_sae_run_finished"),
    }
    (line,) = str(raised.value).splitlines()
    assert line.startswith("world-wild: ")
    for name in ("topk", "wide"):
        check_alike(alone, tmp_path, f"world-{name}")


def test_jobs_of_several_kinds_share_ranks(tmp_path: Path, activations: str) -> None:
    """Two ranks train a dictionary on both, one split into two shards, and one with experts.

    They are stopped and resumed.
    """
    jobs = {
        "whole": {},
        "cut": {"processes.latent_shards": 2, "train.seed": 1},
        "routed": JOBS["routed"] | {"processes.latent_shards": 2},
    }
    path = sweep_file(tmp_path, activations, jobs)
    train_ranks(path, world=2, stop_at=15)
    train_ranks(path, world=2)
    for name in jobs:
        one = sweep_file(tmp_path / name, activations, jobs)
        train_ranks(one, "--job", name, world=2)
        check_alike(tmp_path / name, tmp_path, f"world-{name}")


@contextmanager
def withheld(activations: str, unit: int) -> Iterator[None]:
    """Remove a unit and claim it for another producer, so that no run can end early."""
    store, key = open_store(activations), manifest_key(unit)
    manifest = store.get(key)
    store.put(CLAIMS.key(unit), b"{}")
    store.delete(key)
    try:
        yield
    finally:
        store.put(key, manifest)
        store.delete(CLAIMS.key(unit))


def test_jobs_that_are_spread_over_ranks_are_those_of_each_alone(
    tmp_path: Path, activations: str, alone: Path
) -> None:
    """Two ranks train a job each. They are stopped, and resumed with a third job that diverges.

    The third job goes to the first rank, which reports the failure only after the second rank has
    finished.
    """
    jobs = {name: JOBS[name] for name in ("topk", "wide")}
    spread = {"placement": "spread", "jobs": jobs}
    path = run_file(tmp_path, activations, sweep=spread, processes={"trainers": 2})
    with withheld(activations, unit=8):  # a unit of a second window
        train_ranks(path, world=2, stop_at=15)
    spread["jobs"] = jobs | {"wild": {"train.lr": 1e37, "train.clip_norm": None}}
    path = run_file(tmp_path, activations, sweep=spread, processes={"trainers": 2})
    ranks = start_ranks("train", str(path), world=2)
    errors = [process.communicate(timeout=HANG_SECONDS)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 0], errors
    assert [line for line in errors[0].splitlines() if line.startswith("error: world-wild: ")]
    for name in jobs:
        check_alike(alone, tmp_path, f"world-{name}")


def test_jobs_that_do_not_fit_together_are_refused_before_anything_is_built(
    tmp_path: Path, activations: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each job takes 4 x 4 bytes x (33 x 64 + 16) values, or 34,048 bytes, and two of them fit."""
    monkeypatch.setattr(memory, "memory_of", lambda _: ("here", 70_000))
    jobs = {name: {"train.seed": seed} for seed, name in enumerate("abc")}
    run = load_run(sweep_file(tmp_path, activations, jobs))
    with pytest.raises(ConfigError, match=r"take 0\.0 GB on here .* GB per rank: world-a 3\.4e-05"):
        train_here(run)
    del jobs["c"]
    train_here(load_run(sweep_file(tmp_path, activations, jobs, train={"rows": 320})))
