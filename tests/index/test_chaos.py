"""The index is the same whatever dies or is damaged, and with any number of workers and shards.

Each seed determines a schedule: how many workers start, which is killed when, and which object is
damaged when. Two seeds run by default. With `--long`, 50 seeds run, and all recipes run over
shards.
"""

import random
import time
from pathlib import Path
from typing import Any

import pytest

from dist_sae.config import Run
from dist_sae.index import layout
from tests.forks import processes
from tests.index.indexed import RECIPES, add_checkpoint, files, make_index, produced
from tests.index.workers import work
from tests.launch import start_ranks

pytestmark = pytest.mark.system

BUCKET_LATENTS = 8
LIMIT_SECONDS = 120


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = produced(tmp_path_factory.mktemp("chaos"), "batchtopk", index={"workers": 4})
    add_checkpoint(run)
    return run


@pytest.fixture(scope="module")
def calm(run: Run) -> dict[str, bytes]:
    """The files of an index that one worker builds without faults."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "LEAST_LATENTS", BUCKET_LATENTS)
        return files(make_index(run)["index"])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(50 if metafunc.config.getoption("--long") else 2))
    # one recipe with a fixed k, one with thresholds, one with experts
    if "kind" in metafunc.fixturenames:
        few = ("topk", "jumprelu", "routed")
        metafunc.parametrize("kind", RECIPES if metafunc.config.getoption("--long") else few)


def test_workers_that_die_and_objects_that_rot_leave_the_same_bytes(
    run: Run, calm: dict[str, bytes], seed: int
) -> None:
    chance = random.Random(seed)
    run = run.model_copy(update={"index": run.index.model_copy(update={"name": f"seed-{seed}"})})
    folder = Path(run.store.runs, run.name, "index", f"seed-{seed}")
    lives = 0

    def start() -> Any:
        nonlocal lives
        lives += 1
        arguments = (run.model_dump(mode="json"), f"w{lives}", lives % 4, BUCKET_LATENTS)
        process = processes.Process(target=work, args=arguments, daemon=True)
        process.start()
        return process

    workers = [start() for _ in range(chance.choice([1, 2, 4]))]
    began = time.monotonic()
    kills = [began + chance.uniform(0.02, 2.0) for _ in range(chance.randrange(1, 6))]
    rots = [began + chance.uniform(0.1, 2.0) for _ in range(chance.randrange(3))]
    damaged = bool(rots)
    while any(worker.exitcode != 0 for worker in workers):
        assert time.monotonic() < began + LIMIT_SECONDS, "the schedule did not end"
        if kills and time.monotonic() > min(kills):
            kills.remove(min(kills))
            victim = chance.randrange(len(workers))
            workers[victim].kill()
            workers[victim].join()
            workers[victim] = start()
        if rots and time.monotonic() > min(rots):
            rots.remove(min(rots))
            rot(folder, chance)
        for worker in workers:
            assert worker.exitcode in (None, 0), f"ended with {worker.exitcode}"
        workers[0].join(timeout=0.01)
    if damaged:
        make_index(run, repair=True)
    assert files(str(folder)) == calm
    assert not list(folder.glob("codes/*.bin"))


def rot(folder: Path, chance: random.Random) -> None:
    """Damage or delete one of the objects that stage 2 of the index reads."""
    objects = sorted([*folder.glob("codes/*.bin"), *folder.glob("rows/*.parquet")])
    if not objects:
        return
    path = chance.choice(objects)
    try:
        data = bytearray(path.read_bytes())
        if chance.random() < 0.3:
            path.unlink()
        elif data:
            data[chance.randrange(len(data))] ^= 255
            path.write_bytes(data)
    except FileNotFoundError:
        pass  # a worker has deleted the file meanwhile


def test_shards_and_workers_do_not_matter(tmp_path: Path, kind: str) -> None:
    """One worker of 1, 2 or 4 ranks, and two workers of 2 ranks, build the same bytes."""
    run = produced(tmp_path, kind)
    add_checkpoint(run)
    expected = files(make_index(run)["index"])
    for shards, workers in ((2, 1), (4, 1), (2, 2)):
        name = f"{shards}-{workers}"
        settings = f"index.name={name}", f"index.latent_shards={shards}"
        options = [word for setting in settings for word in ("--set", setting)]
        folder = f"{run.store.runs}/{run.name}"
        programs = [
            program
            for worker in range(workers)
            for program in start_ranks(
                "index", folder, "--worker", f"w{worker}", *options, world=shards
            )
        ]
        errors = [program.communicate(timeout=LIMIT_SECONDS)[1] for program in programs]
        assert not any(program.returncode for program in programs), errors
        assert files(f"{folder}/index/{name}") == expected
