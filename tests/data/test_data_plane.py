"""The stream contract under faults: whatever fails or dies, the trainer sees the same batches.

Each seed determines a schedule: which requests the network and the server disturb and how, which
process is killed when, and how many ranks the reader has after each restart. Two seeds run by
default, 50 with `--long`.
"""

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_sae.config import Run
from dist_sae.config.data import S3Config
from dist_sae.data.upkeep import gc
from dist_sae.producing.planner import plan
from dist_sae.producing.verify import verify
from dist_sae.storage import open_store
from tests.data.dataplane import produce, read
from tests.faults import KINDS, FaultProxy
from tests.forks import processes
from tests.runs import make_run
from tests.servers import OWNER, Server
from tests.servers import seaweedfs as seaweedfs_server

pytestmark = pytest.mark.system

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": OWNER.id,
    "AWS_SECRET_ACCESS_KEY": OWNER.secret,
    "AWS_EC2_METADATA_DISABLED": "true",
}
LIMIT_SECONDS = 120
STEPS = 28


def world(folder: Path, server: Server, endpoint: str, name: str) -> Run:
    """Return a run with 16 training units of about 120 rows in 4 streams.

    Its 28 batches of 64 rows use nearly all rows.
    """
    client = server.client()
    if name not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
        client.create_bucket(Bucket=name)
    return make_run(
        folder,
        store={
            "activations": f"s3://{name}/a",
            "runs": str(folder / "r"),
            "s3": {"endpoint_url": endpoint, "deadline_seconds": 60.0},
            "max_ahead_units": 14,
            "retention": "delete_consumed",
        },
        activations={"window_units": 1, "block_rows": 32},
        train={"rows": STEPS * 64, "batch_rows": 64, "normaliser_rows": 120},
        processes={"producers": 2},
    )


class Schedule:
    """Two producers and a reader that are killed and restarted until the reader is done."""

    def __init__(self, run: Run, folder: Path, seed: int | None) -> None:
        self._settings = run.model_dump(mode="json")
        self._folder = folder
        self._random = None if seed is None else random.Random(seed)
        self.kills = 0

    def run(self, meanwhile: Iterable[None] = ()) -> dict[int, dict[str, Any]]:
        """Return the last line that the reader logged for each step.

        Advances `meanwhile` at every look at the processes.
        """
        chance, ticks = self._random, iter(meanwhile)
        until = time.monotonic() + LIMIT_SECONDS
        producers = [self._producer(i, 0) for i in range(2)]
        reader = self._reader()
        lives = [1, 1]
        kill_at = [
            time.monotonic() + (chance.uniform(0.05, 1.5) if chance else 1e9) for _ in range(3)
        ]
        while reader.exitcode != 0:
            assert time.monotonic() < until, "the schedule did not end"
            for i, at in enumerate(kill_at):
                if time.monotonic() < at:
                    continue
                assert chance is not None
                victim = reader if i == 2 else producers[i]
                self.kills += victim.is_alive()
                victim.kill()
                victim.join()
                again = chance.random() < 0.6  # sometimes a process is not killed again
                kill_at[i] = time.monotonic() + (chance.uniform(0.1, 2.0) if again else 1e9)
                if i == 2:
                    reader = self._reader()
                else:
                    producers[i] = self._producer(i, lives[i])
                    lives[i] += 1
            for process in (*producers, reader):
                assert process.exitcode in (None, 0, -9), f"ended with {process.exitcode}"
            next(ticks, None)
            reader.join(timeout=0.02)
        for process in producers:
            process.join(timeout=max(0.0, until - time.monotonic()))
            assert process.exitcode == 0
        lines = (self._folder / "log.jsonl").read_text().splitlines()
        # a line that a kill cut in two belongs to a step that was repeated
        steps = [json.loads(line) for line in lines if line.endswith("}") and line.startswith("{")]
        return {line["step"]: line for line in steps}

    def _producer(self, number: int, life: int) -> Any:
        arguments = (self._settings, f"producer-{number}-{life}", number, CREDENTIALS)
        process = processes.Process(target=produce, args=arguments, daemon=True)
        process.start()
        return process

    def _reader(self) -> Any:
        ranks = self._random.choice([1, 2, 4]) if self._random else 1
        arguments = (self._settings, ranks, self._folder, CREDENTIALS)
        process = processes.Process(target=read, args=arguments, daemon=True)
        process.start()
        return process


@pytest.fixture(scope="module")
def seaweedfs(server: Callable[[str], Server]) -> Server:
    return server("seaweedfs")


@pytest.fixture(scope="module")
def calm(
    tmp_path_factory: pytest.TempPathFactory, seaweedfs: Server
) -> Iterator[dict[int, dict[str, Any]]]:
    """The batches of a reader in a run without faults."""
    folder = tmp_path_factory.mktemp("calm")
    with pytest.MonkeyPatch.context() as patch:
        _use_credentials(patch)
        run = world(folder, seaweedfs, seaweedfs.endpoint_url, "calm")
        plan(run)
        steps = Schedule(run, folder, None).run()
        assert sorted(steps) == list(range(1, STEPS + 1))
        rows = [row for line in steps.values() for row in line["rows"]]
        assert len(set(rows)) == len(rows) == STEPS * 64
        yield steps


def seeds(config: pytest.Config) -> range:
    return range(50 if config.getoption("--long") else 2)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", seeds(metafunc.config))


def test_whatever_happens_the_same_batches_are_seen(
    tmp_path: Path,
    seaweedfs: Server,
    calm: dict[int, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    """Faults and kills change no batch.

    Every row is read once, every batch is bitwise the same, no corrupt object is accepted, and no
    data is deleted that is still needed.
    """
    _use_credentials(monkeypatch)
    chance = random.Random(seed)
    rates = {kind: chance.choice([0.0, 0.02, 0.08]) for kind in KINDS}
    with FaultProxy(seaweedfs.endpoint_url, seed, rates, most_per_request=2) as proxy:
        run = world(tmp_path, seaweedfs, proxy.endpoint_url, f"seed-{seed}")
        plan(run)
        schedule = Schedule(run, tmp_path, seed)
        steps = schedule.run()
    assert {s: line["digest"] for s, line in steps.items()} == {
        s: line["digest"] for s, line in calm.items()
    }
    assert sorted(r for line in steps.values() for r in line["rows"]) == sorted(
        r for line in calm.values() for r in line["rows"]
    )
    assert sum(proxy.injected.values()) + schedule.kills > 0
    found = verify(run.model_copy(update={"store": _direct(run, seaweedfs)}))
    assert (found["retired_units"], found["missing_units"], found["bad_objects"]) == (16, 0, {})
    orphans = gc(run.model_copy(update={"store": _direct(run, seaweedfs)}), hours=0.0, delete=True)
    store = open_store(run.store.activations, S3Config(endpoint_url=seaweedfs.endpoint_url))
    assert len(list(store.keys("shards/"))) == 1, orphans  # the shard of the held-out unit


def test_a_server_that_dies_comes_back_to_the_same_batches(
    tmp_path: Path, calm: dict[int, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a SIGKILL of the server in mid-request, all processes wait for it and none fails."""
    _use_credentials(monkeypatch)
    with seaweedfs_server() as server:
        run = world(tmp_path, server, server.endpoint_url, "dies")
        plan(run)
        steps = Schedule(run, tmp_path, None).run(_dies_once(server, tmp_path / "log.jsonl"))
    assert {s: line["digest"] for s, line in steps.items()} == {
        s: line["digest"] for s, line in calm.items()
    }


def _dies_once(server: Server, log: Path) -> Iterator[None]:
    """Kill the server after a quarter of the reader's steps, and restart it a second later."""
    assert server.kill is not None
    assert server.start is not None
    while not (log.exists() and log.read_text().count("digest") >= STEPS // 4):
        yield
    server.kill()
    back = time.monotonic() + 1.0
    while time.monotonic() < back:
        yield
    server.start()


def _use_credentials(patch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        patch.setenv(name, value)


def _direct(run: Run, server: Server) -> Any:
    s3 = run.store.s3.model_copy(update={"endpoint_url": server.endpoint_url})
    return run.store.model_copy(update={"s3": s3})
