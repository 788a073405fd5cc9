"""What another run's checkpoint leaves for a run to begin with, and what of it a shard takes."""

from pathlib import Path

import pytest
import torch

from dist_sae.checkpoint import warm_start
from dist_sae.checkpoint.layout import Checkpoint, Checkpoints
from dist_sae.config import Run, load_run
from dist_sae.errors import ConfigError, CorruptObjectError
from dist_sae.sae import build_sae
from dist_sae.sae.axis import WholeAxis
from dist_sae.storage import open_store
from tests.launch import write_run
from tests.sae.recipes import D_IN
from tests.world import save

N_KNOWN, SCALARS = 64, {"scale": 0.5, "run": {"sae": {"kind": "batchtopk"}}, "places": {}}
WEIGHTS = {
    "W_enc": torch.randn(N_KNOWN, D_IN, generator=torch.Generator().manual_seed(0)),
    "W_dec": torch.eye(D_IN).repeat(N_KNOWN // D_IN, 1),
    "b_enc": torch.arange(float(N_KNOWN)),
    "b_dec": torch.arange(float(D_IN)),
    "threshold": torch.tensor([3.0, 2.0], dtype=torch.float64),
}


def make_run(folder: Path, n_latents: int = 96) -> Run:
    sae = {"kind": "batchtopk", "n_latents": n_latents, "k": 3, "auxk": 16}
    return load_run(write_run(folder, sae=sae))


def checkpoint(folder: Path, **tensors: torch.Tensor) -> Checkpoint:
    """Of another run, with what belongs to its training."""
    checkpoints = Checkpoints(open_store(str(folder)), "narrow", 2)
    rest = {"exp_avg.W_enc": torch.ones(N_KNOWN, D_IN), "idle_rows": torch.zeros(N_KNOWN)}
    save(checkpoints, 30, WEIGHTS | rest | tensors, SCALARS)
    return checkpoints.open(30)


def test_weights_are_left_and_nothing_else(tmp_path: Path) -> None:
    run, runs = make_run(tmp_path), open_store(str(tmp_path / "runs"))
    copied = warm_start.leave(checkpoint(tmp_path), runs, run)
    found = warm_start.find(runs, run)
    assert found is not None
    assert found.manifest.tensors.keys() == WEIGHTS.keys()
    assert found.scalars == {name: SCALARS[name] for name in ("scale", "run")}
    assert copied == sum(e.bytes for e in runs.entries() if e.key.endswith("safetensors"))
    assert Checkpoints(runs, run.name, 2).steps() == []  # a run does not take it for its own


def test_the_running_mean_goes_before_the_last_weights(tmp_path: Path) -> None:
    run, runs = make_run(tmp_path), open_store(str(tmp_path / "runs"))
    warm_start.leave(checkpoint(tmp_path, **{"ema.b_enc": torch.ones(N_KNOWN)}), runs, run)
    found = warm_start.find(runs, run)
    assert found is not None
    sae = build_sae(run.sae, D_IN)
    warm_start.load(sae, found)
    assert torch.equal(sae.b_enc[:N_KNOWN], torch.ones(N_KNOWN))
    assert not sae.b_enc[N_KNOWN:].any()


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_a_shard_takes_its_latents_of_what_was_left(tmp_path: Path, shards: int) -> None:
    """96 latents: of 3 shards, 32 wide, the first two are known as a whole, the last is new."""
    run, runs = make_run(tmp_path), open_store(str(tmp_path / "runs"))
    warm_start.leave(checkpoint(tmp_path), runs, run)
    found = warm_start.find(runs, run)
    assert found is not None
    parts = []
    for shard in range(shards):
        sae = build_sae(run.sae, D_IN, WholeAxis(shard=shard, shards=shards))
        warm_start.load(sae, found)
        parts.append(sae)
        for name in ("b_dec", "threshold"):
            assert torch.equal(sae.state_dict()[name], WEIGHTS[name])
    for name in ("W_enc", "W_dec", "b_enc"):
        whole = torch.cat([sae.state_dict()[name] for sae in parts])
        assert torch.equal(whole[:N_KNOWN], WEIGHTS[name])
        assert not whole[N_KNOWN:].nan_to_num().any()


def test_what_was_left_last_counts(tmp_path: Path) -> None:
    """Also when it is from an earlier step."""
    run, runs = make_run(tmp_path), open_store(str(tmp_path / "runs"))
    late = checkpoint(tmp_path)
    checkpoints = Checkpoints(open_store(str(tmp_path)), "narrow", 2)
    save(checkpoints, 10, WEIGHTS, SCALARS)
    for one in (late, checkpoints.open(10)):
        warm_start.leave(one, runs, run)
    found = warm_start.find(runs, run)
    assert found is not None
    assert found.step == 10


def test_a_damaged_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    run, runs = make_run(tmp_path), open_store(str(tmp_path / "runs"))
    damaged = checkpoint(tmp_path)
    part = tmp_path / damaged.manifest.tensors["W_dec"].parts[0].key
    part.write_bytes(part.read_bytes()[:-1] + b"!")
    with pytest.raises(CorruptObjectError, match="W_dec-000000000"):
        warm_start.leave(damaged, runs, run)
    assert warm_start.find(runs, run) is None


def test_activations_of_another_width_are_refused(tmp_path: Path) -> None:
    run, runs = make_run(tmp_path), open_store(str(tmp_path / "runs"))
    warm_start.leave(checkpoint(tmp_path), runs, run)
    found = warm_start.find(runs, run)
    assert found is not None
    with pytest.raises(ConfigError, match="16 wide, these are 8 wide"):
        warm_start.load(build_sae(run.sae, 8), found)
