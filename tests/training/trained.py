"""Runs of the trainer in the small world, and comparisons of their results."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_sae.checkpoint.layout import Checkpoint, Checkpoints
from dist_sae.storage import open_store
from dist_sae.telemetry.history import read_history
from tests.runs import write_run

STEPS = 60
SHARDED = ("--set", "processes.latent_shards=2")


def run_file(folder: Path, activations: str, **sections: Any) -> Path:
    store = {"activations": activations, "runs": str(folder / "runs")}
    return write_run(folder, store=store, **sections)


def final(folder: Path) -> Checkpoint:
    checkpoint = Checkpoints(open_store(str(folder / "runs")), "world", 2).latest()
    assert checkpoint is not None
    return checkpoint


def history(folder: Path) -> list[dict[str, Any]]:
    return read_history(open_store(str(folder / "runs")), "world")


def check_equal_up_to_rounding(one: Path, other: Path) -> None:
    """Check that two runs differ only by rounding, because their fp32 sums have another order."""
    assert final(one).step == final(other).step == STEPS
    for here, there in zip(history(one), history(other), strict=True):
        assert there["fvu"] == pytest.approx(here["fvu"], rel=1e-5), here["step"]
        assert there["l0_latents"] == pytest.approx(here["l0_latents"], rel=1e-3), here["step"]
        assert there["auxk_loss"] == pytest.approx(here["auxk_loss"], rel=1e-4), here["step"]
        assert there["gradient_norm"] == pytest.approx(here["gradient_norm"], rel=1e-4)
        assert there["loss"] == pytest.approx(here["loss"], rel=1e-5), here["step"]
        assert there.get("dead_share") == here.get("dead_share")
        if there["density_rows"] == here["density_rows"]:  # every process counts from 0
            assert there["density"] == here["density"], here["step"]
            assert there["rare_share"] == here["rare_share"]
        assert there["shard_load_ratio"] >= here["shard_load_ratio"] == 1
        assert there["starved_share"] == here["starved_share"]
    check_close(final(one), final(other))


def check_close(one: Checkpoint, other: Checkpoint) -> None:
    assert one.manifest.tensors.keys() == other.manifest.tensors.keys()
    assert torch.equal(one.read("idle_rows"), other.read("idle_rows"))
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        error = (one.read(name) - other.read(name)).norm() / one.read(name).norm()
        assert float(error) < 1e-4, name


def check_same(one: Checkpoint, other: Checkpoint) -> None:
    assert one.manifest.tensors.keys() == other.manifest.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.read(name)), name
