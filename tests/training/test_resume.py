"""Training that is stopped, killed, or moved to other numbers of ranks gives the same result.

The tests use real processes.
"""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dist_sae.config import load_run
from dist_sae.data.shard import manifest_key, read_manifest
from dist_sae.evaluation.evaluate import evaluate
from dist_sae.interop.export import export
from dist_sae.storage import open_store
from tests.launch import keep_close, produce, start, train
from tests.runs import write_run
from tests.training.trained import (
    SHARDED,
    STEPS,
    check_equal_up_to_rounding,
    check_same,
    final,
    history,
    run_file,
)

pytestmark = pytest.mark.system


def test_a_stopped_run_resumes_bitwise(tmp_path: Path, activations: str, calm: Path) -> None:
    path = run_file(tmp_path, activations)
    (error,) = train(path, stop_at=20)
    assert "stopped at step" in error
    assert "start again to continue" in error
    stopped_at = final(tmp_path).step
    assert 20 <= stopped_at < STEPS
    train(path)
    one, other = final(calm), final(tmp_path)
    assert (one.step, one.scalars) == (other.step, other.scalars) == (STEPS, one.scalars)
    check_same(one, other)
    losses = [[r["fvu"], r["gradient_norm"], r.get("dead_share")] for r in history(calm)]
    assert losses == [
        [r["fvu"], r["gradient_norm"], r.get("dead_share")] for r in history(tmp_path)
    ]
    assert [r["step"] for r in history(tmp_path)] == list(range(1, STEPS + 1))


def test_a_stop_while_waiting_for_data_saves_what_was_done(tmp_path: Path, calm: Path) -> None:
    """At first only 8 of 16 units exist, one window of each stream.

    The others appear after the stop.
    """
    path = write_run(tmp_path)
    produce(path)
    store = open_store(str(tmp_path / "activations"))
    later = {manifest_key(unit): store.get(manifest_key(unit)) for unit in range(8, 16)}
    for key in later:
        store.delete(key)
    rows = [sum(read_manifest(store, u).rows for u in (v, v + 4)) for v in range(4)]
    last = min(rows) // 40  # each batch takes 40 rows from each of the 4 streams
    train(path, world=2, stop_at=last)
    assert final(tmp_path).step == last
    for key, data in later.items():
        store.put(key, data)
    train(path, world=2)
    assert [r["step"] for r in history(tmp_path)] == list(range(1, STEPS + 1))
    assert history(tmp_path)[-1]["fvu"] == pytest.approx(history(calm)[-1]["fvu"], rel=1e-4)


@pytest.mark.parametrize(("stage", "shards"), [(0, 1), (2, 2)], ids=["replicas", "zero-2, shards"])
def test_two_ranks_train_as_one(
    tmp_path: Path, activations: str, calm: Path, stage: int, shards: int
) -> None:
    deepspeed = {"zero_optimization": {"stage": stage}} if stage else {}
    path = run_file(tmp_path, activations, train={"deepspeed": deepspeed})
    train(path, "--set", f"processes.latent_shards={shards}", world=2)
    check_equal_up_to_rounding(calm, tmp_path)


def test_two_shards_train_as_one(calm: Path, sharded: Path) -> None:
    check_equal_up_to_rounding(calm, sharded)
    parts = final(sharded).manifest.tensors["W_enc"].parts
    assert [(part.start, part.stop) for part in parts] == [(0, 32), (32, 64)]


def test_a_sharded_run_resumes_bitwise(tmp_path: Path, activations: str, sharded: Path) -> None:
    path = run_file(tmp_path, activations)
    train(path, *SHARDED, world=2, stop_at=20)
    assert 20 <= final(tmp_path).step < STEPS
    train(path, *SHARDED, world=2)
    check_same(final(sharded), final(tmp_path))
    assert [r["fvu"] for r in history(sharded)] == [r["fvu"] for r in history(tmp_path)]


def test_a_run_goes_on_however_its_ranks_are_arranged(
    tmp_path: Path, activations: str, calm: Path
) -> None:
    """The run uses two shards, one rank, two replicas, and two shards again.

    ZeRO-1 is on, and its partitions change with the replicas.
    """
    settings = {"deepspeed": {"zero_optimization": {"stage": 1}}}
    path = run_file(tmp_path, activations, train=settings)
    train(path, *SHARDED, world=2, stop_at=10)
    train(path, stop_at=22)
    train(path, world=2, stop_at=34)
    train(path, *SHARDED, world=2)
    check_equal_up_to_rounding(calm, tmp_path)


def test_what_shards_saved_is_whole_for_whoever_reads_it(
    activations: str, calm: Path, sharded: Path
) -> None:
    """The results differ by rounding in fp32, as above."""
    one, two = (load_run(run_file(folder, activations)) for folder in (calm, sharded))
    here, there = evaluate(one), evaluate(two)
    for name in ("fvu", "l0", "dead_share", "pca_fvu"):
        assert there[name] == pytest.approx(here[name], rel=1e-3), name
    weights = [load_file(Path(export(run)) / "sae_weights.safetensors") for run in (one, two)]
    for name, tensor in weights[0].items():
        assert weights[1][name].shape == tensor.shape
        assert float((weights[1][name] - tensor).norm() / tensor.norm()) < 1e-4, name


def test_a_run_stopped_on_two_ranks_goes_on_with_one(
    tmp_path: Path, activations: str, calm: Path
) -> None:
    path = run_file(tmp_path, activations)
    errors = train(path, world=2, stop_at=15)
    assert all("stopped at step" in error for error in errors)
    train(path, world=1)
    assert final(tmp_path).step == STEPS
    assert history(tmp_path)[-1]["fvu"] == pytest.approx(history(calm)[-1]["fvu"], rel=1e-4)


def test_a_killed_run_repeats_what_was_not_saved_bitwise(
    tmp_path: Path, activations: str, calm: Path
) -> None:
    path = run_file(tmp_path, activations, train={"save_every_steps": 7})
    process = start("train", str(path))
    keep_close(process)
    for line in process.stdout:
        # the save at step 21 waited for the save at 14, so that one is complete
        if line.startswith("{") and json.loads(line)["done"] >= 22:
            process.kill()
            break
    process.communicate()
    assert final(tmp_path).step in range(14, 60, 7)
    train(path)
    check_same(final(calm), final(tmp_path))
