"""The whole pipeline under a seeded schedule of deaths, store faults and restarts.

There are producers, an S3 server behind a proxy that injects faults, a scraper of all metrics, and
a trainer of one to four ranks. The trainer is killed, told to stop, and restarted with another
number of ranks. Whatever happens, the trainer gets the same rows at every step as in a calm run,
and ends with the same parameters.

One schedule runs by default, 30 with `--long`.
"""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dist_sae.checkpoint.layout import Checkpoint, Checkpoints
from dist_sae.config import Run, load_run
from dist_sae.config.data import S3Config
from dist_sae.distributed.local_ranks import rank_environments
from dist_sae.producing.planner import plan
from dist_sae.storage import open_store
from dist_sae.telemetry.history import read_history
from tests.chaos.job import produce_units, train_rank, train_with_stalled_save
from tests.chaos.scraper import Scraper
from tests.faults import KINDS, FaultProxy
from tests.forks import processes
from tests.runs import write_run
from tests.servers import OWNER, Server

pytestmark = pytest.mark.system

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": OWNER.id,
    "AWS_SECRET_ACCESS_KEY": OWNER.secret,
    "AWS_EC2_METADATA_DISABLED": "true",
}
LIMIT_SECONDS = 240.0
SHAPES = ((1, 1), (2, 1), (2, 2), (4, 2))  # (ranks, latent shards)
STREAMS = 4


def make_run(folder: Path, server: Server, endpoint: str, name: str) -> Run:
    """Return a run with 60 steps of 160 rows from 16 units, and a checkpoint every 5 steps."""
    client = server.client()
    if name not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
        client.create_bucket(Bucket=name)
    store = {
        "activations": f"s3://{name}/activations",
        "runs": f"s3://{name}/runs",
        "s3": {"endpoint_url": endpoint, "deadline_seconds": 60.0},
    }
    path = write_run(folder, train={"save_every_steps": 5}, processes={"producers": 2})
    settings = [f"store.{key}={json.dumps(value)}" for key, value in store.items()]
    return load_run(path, settings)


class Outcome(NamedTuple):
    """The result of a pipeline."""

    checkpoint: Checkpoint
    rows: dict[tuple[int, int], str]
    """Digest of the rows last trained on, by step and stream."""
    fvu: list[float]
    deaths: int
    starts: int


class Pipeline:
    """Producers and a trainer that run to the end, whatever the schedule does to them."""

    def __init__(self, run: Run, folder: Path, chance: random.Random | None) -> None:
        self._run = run
        self._chance = chance
        self._seen = folder / "seen.jsonl"
        self._targets = folder / "targets"
        self._targets.mkdir()
        self._until = time.monotonic() + LIMIT_SECONDS
        self._lives = 0
        self._deaths = 0
        self._starts = 0

    def run(self) -> tuple[dict[tuple[int, int], str], int, int]:
        with Scraper(self._targets) as scraper:
            producers = self.producers()
            while not self._train(producers):
                pass
            for producer in producers:
                producer.join(self._left())
                assert producer.exitcode == 0
        self._check_metrics(scraper)
        rows = {}
        for line in self._seen.read_text().splitlines():
            step, stream, digest = json.loads(line)
            # a later line replaces an earlier one: steps after the last checkpoint are repeated
            rows[step, stream] = digest
        return rows, self._deaths, self._starts

    def producers(self) -> list[Any]:
        """Start two producers."""
        return [self._producer(number) for number in range(2)]

    def wait(self, until: Callable[[], bool]) -> None:
        """Wait for `until` to return true."""
        while not until():
            assert self._left() > 0, "it did not come to that"
            time.sleep(0.02)

    def _check_metrics(self, scraper: Scraper) -> None:
        """Check that no later life repeats a step that the metrics had reported as checkpointed."""
        scraper.check_counters()
        durable = 0.0
        for life in range(1, self._starts + 1):
            first = f"train-{life:03d}-0"
            if first in scraper.samples:
                steps = [step for step in scraper.values(first, "dist_sae_train_step") if step]
                saved = [s for s in scraper.values(first, "dist_sae_checkpoint_step") if s]
                # the first values seen may be those of the checkpoint that the life resumes from
                begun = [*steps[:1], *saved[:1]]
                assert all(step >= durable for step in begun), (life, durable, begun)
                assert steps == sorted(steps)
                assert saved == sorted(saved)
                assert all(step <= self._run.steps for step in saved)
                durable = max([durable, *saved])
        assert durable > 0
        assert any(name.startswith("produce") for name in scraper.samples)

    def _train(self, producers: list[Any]) -> bool:
        """Run one life of the trainer, and return whether it reached the end."""
        chance = self._chance
        ranks = self._ranks()
        plot = self._plot() if chance else []
        began = time.monotonic()
        while any(rank.is_alive() for rank in ranks):
            assert self._left() > 0, "the pipeline did not end"
            while plot and time.monotonic() - began > plot[0][0]:
                _, victim, number = plot.pop(0)
                self._strike(producers, ranks, victim, number)
            time.sleep(0.02)
        codes = [rank.exitcode for rank in ranks]
        assert set(codes) <= {0, 75, -signal.SIGKILL, -signal.SIGTERM}, codes
        return set(codes) == {0}

    def _plot(self) -> list[tuple[float, str, signal.Signals]]:
        """Return (time, victim, signal) of each event in one life of the trainer."""
        chance = self._chance
        assert chance is not None
        if self._starts > 3:
            return []  # later lives are undisturbed, so that the run ends
        events = [(chance.uniform(0.5, 8.0), "trainer", chance.choice(_SIGNALS))]
        if chance.random() < 0.5:
            events.append((chance.uniform(0.2, 4.0), "producer", signal.SIGKILL))
        return sorted(events)

    def _strike(
        self, producers: list[Any], ranks: list[Any], victim: str, number: signal.Signals
    ) -> None:
        assert self._chance is not None
        among = ranks if victim == "trainer" else producers
        index = self._chance.randrange(len(among))
        process = among[index]
        if process.is_alive():
            self._deaths += 1
            os.kill(process.pid, number)
        if victim == "producer":
            process.join()
            producers[index] = self._producer(index)

    def _ranks(self) -> list[Any]:
        return self.ranks(*(self._chance.choice(SHAPES) if self._chance else (1, 1)))

    def ranks(self, world: int, shards: int, work: Callable[..., None] = train_rank) -> list[Any]:
        """Start the ranks of the trainer."""
        self._starts += 1
        settings = self._run.model_dump(mode="json")
        settings["processes"] |= {"trainers": world, "latent_shards": shards}
        started = []
        for rank, env in enumerate(rank_environments(world, world)):
            target = self._targets / f"train-{self._starts:03d}-{rank}"
            started.append(self._start(work, settings, target, self._seen, CREDENTIALS | env))
        return started

    def _producer(self, number: int) -> Any:
        self._lives += 1
        settings = self._run.model_dump(mode="json")
        name = f"produce-{number}-{self._lives}"
        target = self._targets / name
        return self._start(produce_units, settings, target, name, number, CREDENTIALS)

    def _start(self, work: Callable[..., None], *arguments: Any) -> Any:
        process = processes.Process(target=work, args=arguments, daemon=True)
        process.start()
        return process

    def _left(self) -> float:
        return self._until - time.monotonic()


_SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)


def outcome(run: Run, folder: Path, server: Server, chance: random.Random | None) -> Outcome:
    plan(run)
    rows, deaths, starts = Pipeline(run, folder, chance).run()
    runs = open_store(run.store.runs, S3Config(endpoint_url=server.endpoint_url))
    checkpoint = Checkpoints(runs, run.name, 2).latest()
    assert checkpoint is not None
    fvu = [record["fvu"] for record in read_history(runs, run.name)]
    return Outcome(checkpoint, rows, fvu, deaths, starts)


@pytest.fixture(scope="module")
def seaweedfs(server: Callable[[str], Server]) -> Server:
    return server("seaweedfs")


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, seaweedfs: Server) -> Outcome:
    """The outcome of a single rank without faults."""
    folder = tmp_path_factory.mktemp("calm")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        run = make_run(folder, seaweedfs, seaweedfs.endpoint_url, "calm-pipeline")
        found = outcome(run, folder, seaweedfs, None)
    assert found.starts == 1
    assert sorted(found.rows) == [(step, v) for step in range(run.steps) for v in range(STREAMS)]
    assert len(set(found.rows.values())) == len(found.rows)
    return found


def check_alike(one: Checkpoint, other: Checkpoint) -> None:
    """Check that parameters agree within 1e-5.

    With another number of ranks, sums are taken in another order.
    """
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        error = (one.read(name) - other.read(name)).norm() / one.read(name).norm()
        assert float(error) <= 1e-5, name


def test_a_stop_during_a_save_keeps_both(
    tmp_path: Path, seaweedfs: Server, calm: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A SIGTERM during a save loses nothing.

    The save is finished, the steps since then are saved too, and all ranks end.
    """
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    run = make_run(tmp_path, seaweedfs, seaweedfs.endpoint_url, "stop-in-a-save")
    plan(run)
    pipeline = Pipeline(run, tmp_path, None)
    produced = pipeline.producers()
    ranks = pipeline.ranks(2, 2, train_with_stalled_save)
    pipeline.wait(lambda: len(list(tmp_path.glob("held-*"))) == len(ranks))
    os.kill(ranks[1].pid, signal.SIGTERM)
    ranks[0].join(2.0)
    checkpoints = Checkpoints(open_store(run.store.runs, run.store.s3), run.name, 2)
    assert checkpoints.steps() == []
    assert all(rank.is_alive() for rank in ranks)
    (tmp_path / "go").touch()
    pipeline.wait(lambda: not any(rank.is_alive() for rank in [*ranks, *produced]))
    assert [rank.exitcode for rank in ranks] == [75, 75]
    saved = checkpoints.steps()
    assert saved[0] == 5
    assert len(saved) == 2
    assert saved[1] < run.steps
    rows, _, _ = pipeline.run()
    assert rows == calm.rows
    last = checkpoints.latest()
    assert last is not None
    assert last.step == run.steps
    check_alike(calm.checkpoint, last)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(30 if metafunc.config.getoption("--long") else 1))


def test_chaos_changes_nothing(
    tmp_path: Path,
    seaweedfs: Server,
    calm: Outcome,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    """Faults do not change the rows of a step. Losses and parameters agree within 1e-5."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    chance = random.Random(seed)
    rates = {kind: chance.choice([0.0, 0.01, 0.04]) for kind in KINDS}
    with FaultProxy(seaweedfs.endpoint_url, seed, rates, most_per_request=2) as proxy:
        run = make_run(tmp_path, seaweedfs, proxy.endpoint_url, f"chaos-{seed}")
        found = outcome(run, tmp_path, seaweedfs, chance)
    assert found.deaths + sum(proxy.injected.values()) > 0
    assert found.rows == calm.rows
    assert found.fvu == pytest.approx(calm.fvu, rel=1e-5)
    assert found.checkpoint.step == calm.checkpoint.step == run.steps
    check_alike(calm.checkpoint, found.checkpoint)
