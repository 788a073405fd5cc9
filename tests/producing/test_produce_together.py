"""Producing with two ranks, as processes, that share one model."""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from dist_sae.config import load_run
from dist_sae.data.shard import CLAIMS, SiteRows, existing_units, read_block, read_manifest
from dist_sae.distributed.local_ranks import rank_environments
from dist_sae.producing.planner import plan
from dist_sae.storage import open_store
from tests.forks import HANG_SECONDS, processes
from tests.models.sharded_worker import produce_rank
from tests.models.test_huggingface import VOCABULARY, save_model
from tests.runs import write_run

pytestmark = pytest.mark.system

SITES = ("resid_post.1", "attn_z.0")


def run_file(folder: Path, model: Path, **model_settings: Any) -> Path:
    """Write a corpus of 400 documents of 10 to 60 words, and return the path of its run file."""
    corpus = folder / "corpus.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    words = [f"w{n}" for n in range(3, VOCABULARY)]
    texts = [" ".join(chance.choices(words, k=chance.randint(10, 60))) for _ in range(400)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return write_run(
        folder,
        model={
            "kind": "huggingface",
            "path": str(model),
            "dtype": "fp32",
            "batch_tokens": 256,
            **model_settings,
        },
        corpus={"kind": "files", "files": [str(corpus)]},
        activations={"sites": SITES, "unit_rows": 700, "streams": 2},
        train={"site": SITES[0]},
    )


class Rank(NamedTuple):
    """A rank of a producer, as a process."""

    process: Any
    said: Path

    def ends(self) -> tuple[int, str]:
        """Wait for the process, and return its exit code and its last message."""
        self.process.join(HANG_SECONDS)
        return self.process.exitcode, self.said.read_text() if self.said.exists() else ""


def start_ranks(path: Path, world: int = 2) -> list[Rank]:
    settings = load_run(path, ["timeouts.lost_seconds=5"]).model_dump(mode="json")
    ranks = []
    for rank, env in enumerate(rank_environments(world, world)):
        said = path.with_name(f"said-{env['MASTER_PORT']}-{rank}")
        process = processes.Process(
            target=produce_rank, args=(settings, str(said), env), daemon=True
        )
        process.start()
        ranks.append(Rank(process, said))
    return ranks


def units(folder: Path) -> list[int]:
    store = open_store(str(folder / "activations"))
    return sorted(existing_units(store))


def rows_of(folder: Path, unit: int, site: str) -> SiteRows:
    store = open_store(str(folder / "activations"))
    shard = read_manifest(store, unit).sites[site]
    blocks = [read_block(store, shard, number) for number in range(len(shard.blocks))]
    return SiteRows(*map(torch.cat, zip(*blocks, strict=True)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A folder of units that one rank produced."""
    folder = tmp_path_factory.mktemp("alone")
    path = run_file(folder, model)
    plan(load_run(path))
    assert [rank.ends()[0] for rank in start_ranks(path, 1)] == [0]
    return folder


def check_same_rows(one: Path, other: Path) -> None:
    assert units(one) == units(other) != []
    for unit in units(one):
        for site in SITES:
            a, b = rows_of(one, unit, site), rows_of(other, unit, site)
            for name in ("tokens", "positions", "documents"):
                assert torch.equal(getattr(a, name), getattr(b, name))
            assert float((a.acts - b.acts).norm() / a.acts.norm()) <= 1e-5


def test_two_ranks_produce_what_one_produces(tmp_path: Path, model: Path, alone: Path) -> None:
    path = run_file(tmp_path, model, tensor_parallel=2)
    plan(load_run(path))
    assert [rank.ends()[0] for rank in start_ranks(path)] == [0, 0]
    check_same_rows(alone, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_when_one_rank_ends_all_end_and_what_is_left_can_be_finished(
    tmp_path: Path, model: Path, alone: Path, number: signal.Signals
) -> None:
    """If one rank is stopped or killed, all ranks end, and the rest can be produced later.

    The signal goes to rank 1 after the first unit. The last unit is claimed by another worker until
    then, so the ranks cannot have finished.
    """
    path = run_file(tmp_path, model, tensor_parallel=2)
    planned = len(plan(load_run(path)).units)
    store, last = open_store(str(tmp_path / "activations")), CLAIMS.key(planned - 1)
    store.put(last, b"{}")
    ranks = start_ranks(path)
    until = time.monotonic() + 120
    while not units(tmp_path):
        assert time.monotonic() < until
        time.sleep(0.02)
    os.kill(ranks[1].process.pid, number)
    (led, words), (followed, _) = (rank.ends() for rank in ranks)
    assert led == 75
    assert followed == (75 if number == signal.SIGTERM else -signal.SIGKILL)
    assert ("rank 1 (" in words) == (number == signal.SIGKILL)
    assert len(units(tmp_path)) < planned
    store.delete(last)
    assert [rank.ends()[0] for rank in start_ranks(path)] == [0, 0]
    check_same_rows(alone, tmp_path)


def test_another_number_of_ranks_is_an_error(tmp_path: Path, model: Path) -> None:
    path = run_file(tmp_path, model, tensor_parallel=2)
    plan(load_run(path))
    (one,) = start_ranks(path, 1)
    code, said = one.ends()
    assert code == 2
    assert said.startswith("model.tensor_parallel is 2, but WORLD_SIZE is 1; ")
