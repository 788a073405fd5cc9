"""The trainer as processes: resume, ranks, bad endings. The synthetic world, one thread a rank."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_sae.checkpoint.layout import Checkpoint, Checkpoints
from dist_sae.data.shard import manifest_key, read_manifest
from dist_sae.storage import open_store
from dist_sae.telemetry.history import read_history
from tests.launch import produce, run, start, train, write_run

STEPS = 60


@pytest.fixture(scope="module")
def activations(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("activations")
    produce(write_run(folder))
    return str(folder / "activations")


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, activations: str) -> Path:
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("calm")
    path = write_run(folder, store={"activations": activations, "runs": str(folder / "runs")})
    train(path)
    return folder


def run_file(folder: Path, activations: str, **sections: Any) -> Path:
    store = {"activations": activations, "runs": str(folder / "runs")}
    return write_run(folder, store=store, **sections)


def final(folder: Path) -> Checkpoint:
    checkpoint = Checkpoints(open_store(str(folder / "runs")), "world", 2).latest()
    assert checkpoint is not None
    return checkpoint


def history(folder: Path) -> list[dict[str, Any]]:
    return read_history(open_store(str(folder / "runs")), "world")


def test_a_stopped_run_resumes_bitwise(tmp_path: Path, activations: str, calm: Path) -> None:
    path = run_file(tmp_path, activations)
    (error,) = train(path, stop_at=20)
    assert "stopped at step" in error
    assert "start again to go on" in error
    stopped_at = final(tmp_path).step
    assert 20 <= stopped_at < STEPS
    train(path)
    one, other = final(calm), final(tmp_path)
    assert (one.step, one.scalars) == (other.step, other.scalars) == (STEPS, one.scalars)
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[name]), name
    losses = [[r["fvu"], r["gradient_norm"], r["dead_share"]] for r in history(calm)]
    assert losses == [[r["fvu"], r["gradient_norm"], r["dead_share"]] for r in history(tmp_path)]
    assert [r["step"] for r in history(tmp_path)] == list(range(1, STEPS + 1))


def test_a_stop_while_waiting_for_data_saves_what_was_done(tmp_path: Path, calm: Path) -> None:
    """Of 16 units the first 8 are there: one window of each stream. Then there are all."""
    path = write_run(tmp_path)
    produce(path)
    store = open_store(str(tmp_path / "activations"))
    later = {manifest_key(unit): store.get(manifest_key(unit)) for unit in range(8, 16)}
    for key in later:
        store.delete(key)
    rows = [sum(read_manifest(store, u).rows for u in (v, v + 4)) for v in range(4)]
    last = min(rows) // 40  # of each batch, 40 rows come from each of the 4 streams
    train(path, world=2, stop_at=last)
    assert final(tmp_path).step == last
    for key, data in later.items():
        store.put(key, data)
    train(path, world=2)
    assert [r["step"] for r in history(tmp_path)] == list(range(1, STEPS + 1))
    assert history(tmp_path)[-1]["fvu"] == pytest.approx(history(calm)[-1]["fvu"], rel=1e-4)


def test_two_ranks_train_as_one(tmp_path: Path, activations: str, calm: Path) -> None:
    """Sums in another order: fp32 differs in the last bits, and no more (SCIENCE D2)."""
    train(run_file(tmp_path, activations), world=2)
    for one, two in zip(history(calm), history(tmp_path), strict=True):
        assert two["fvu"] == pytest.approx(one["fvu"], rel=1e-5), one["step"]
        assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-4)
        assert two["dead_share"] == one["dead_share"]
    one, two = final(calm).tensors, final(tmp_path).tensors
    for name in ("W_enc", "W_dec", "b_dec"):
        error = (one[name] - two[name]).norm() / one[name].norm()
        assert float(error) < 1e-4, name


def test_a_run_stopped_on_two_ranks_goes_on_with_one(
    tmp_path: Path, activations: str, calm: Path
) -> None:
    path = run_file(tmp_path, activations)
    errors = train(path, world=2, stop_at=15)
    assert all("stopped at step" in error for error in errors)
    train(path, world=1)
    assert final(tmp_path).step == STEPS
    assert history(tmp_path)[-1]["fvu"] == pytest.approx(history(calm)[-1]["fvu"], rel=1e-4)


def test_training_lowers_fvu_and_auxk_takes_part(calm: Path) -> None:
    records = history(calm)
    assert records[-1]["fvu"] < 0.75 * records[0]["fvu"]
    assert any(record["auxk_loss"] > 0 for record in records)


def test_other_settings_under_the_same_name_are_refused(activations: str, calm: Path) -> None:
    path = run_file(calm, activations)
    error = run("train", str(path), "--set", "train.lr=0.5", code=2)
    assert "train.lr: 0.003 -> 0.5" in error
    assert error.count("error:") == 1
    run("train", str(path), "--set", "train.log_every_steps=7")  # how it is told is free to change


def test_too_little_data_is_said_before_the_first_step(tmp_path: Path, activations: str) -> None:
    error = run("train", str(run_file(tmp_path, activations, train={"max_passes": 1})), code=2)
    assert "train.rows asks for 9600 rows" in error
    assert not (tmp_path / "runs").exists()


def test_a_run_that_meets_the_end_of_its_data_can_be_finished(
    tmp_path: Path, activations: str
) -> None:
    """The plan's estimate counts rows that are excluded later: 5 % more are let through."""
    settings = {
        "rows": 6080,
        "max_passes": 1,
    }  # 190 documents of 32 rows; a row of each is left out
    path = run_file(tmp_path, activations, train=settings)
    error = run("train", str(path), code=2)
    assert "raise train.max_passes and start again" in error
    stopped_at = final(tmp_path).step
    assert 0 < stopped_at < 6080 // 160
    run("train", str(path), "--set", "train.max_passes=2")
    assert [r["step"] for r in history(tmp_path)] == list(range(1, 6080 // 160 + 1))


def test_a_killed_run_repeats_what_was_not_saved_bitwise(
    tmp_path: Path, activations: str, calm: Path
) -> None:
    path = run_file(tmp_path, activations, train={"save_every_steps": 7})
    process = start("train", str(path))
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{") and json.loads(line)["done"] >= 17:
            process.kill()
            break
    process.communicate()
    assert final(tmp_path).step in range(14, 60, 7)
    train(path)
    for name, tensor in final(calm).tensors.items():
        assert torch.equal(tensor, final(tmp_path).tensors[name]), name


def test_a_damaged_shard_stops_the_run_and_is_named(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    produce(path)
    store = tmp_path / "activations"
    shard = read_manifest(open_store(str(store)), 0).sites["synthetic"]
    data = bytearray((store / shard.key).read_bytes())
    data[shard.blocks[0].offset + shard.blocks[0].bytes - 1] ^= 1
    (store / shard.key).write_bytes(data)
    error = run("train", str(path), code=2)
    assert shard.key in error
    assert "checksum" in error


def test_the_evaluation_and_the_export_follow(calm: Path, activations: str) -> None:
    path = str(run_file(calm, activations))
    result = json.loads(run("evaluate", path, "--json").splitlines()[-1])
    assert {"fvu", "l0", "dead_share", "rows", "pca_fvu"} <= result.keys()
    assert result["fvu"] < result["pca_fvu"]
    assert result["l0"] == pytest.approx(3, abs=0.2)
    assert json.loads((calm / "runs" / "world" / "evaluation.json").read_text()) == result
    where = json.loads(run("export", path, "--json").splitlines()[-1])["export"]
    assert {p.name for p in Path(where).iterdir()} == {"cfg.json", "sae_weights.safetensors"}
