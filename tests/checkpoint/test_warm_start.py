"""Starting a run from another run's checkpoint, on one or several shards."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_sae.checkpoint import warm_start
from dist_sae.checkpoint.layout import Checkpoint, Checkpoints
from dist_sae.config import Run, load_run, validate_run
from dist_sae.config.fingerprint import run_fingerprint
from dist_sae.dictionaries import build_sae
from dist_sae.dictionaries.axis import WHOLE, LatentAxis
from dist_sae.distributed.mesh import Mesh
from dist_sae.distributed.rendezvous import Ranks
from dist_sae.distributed.watch import Watch
from dist_sae.errors import ConfigError, CorruptObjectError
from dist_sae.producing.planner import plan
from dist_sae.storage import open_store
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.training.loop import train
from tests.dictionaries.recipes import D_IN
from tests.runs import WORLD, write_run
from tests.world import save

N_KNOWN = 64
NARROW = WORLD | {
    "name": "narrow",
    "sae": {"kind": "batchtopk", "n_latents": N_KNOWN, "k": 3, "auxk": 16},
    "store": {"activations": "a", "runs": "r"},
}
SCALARS = {"scale": 0.5, "run": run_fingerprint(validate_run(NARROW, "narrow")), "places": {}}
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
    """Return a checkpoint of another run, with its training state."""
    checkpoints = Checkpoints(open_store(str(folder)), "narrow", 2)
    rest = {"exp_avg.W_enc": torch.ones(N_KNOWN, D_IN), "idle_rows": torch.zeros(N_KNOWN)}
    save(checkpoints, 30, WEIGHTS | rest | tensors, SCALARS)
    return checkpoints.open(30)


def test_weights_are_left_and_nothing_else(tmp_path: Path) -> None:
    run, runs = make_run(tmp_path), open_store(str(tmp_path / "runs"))
    copied = warm_start.prepare(checkpoint(tmp_path), runs, run)
    found = warm_start.find(runs, run, "plan")
    assert found is not None
    assert found.manifest.tensors.keys() == WEIGHTS.keys()
    assert found.scalars == {name: SCALARS[name] for name in ("scale", "run")}
    assert copied == sum(e.bytes for e in runs.entries() if e.key.endswith("safetensors"))
    # the run does not mistake the copy for its own checkpoint
    assert Checkpoints(runs, run.name, 2).steps() == []


def test_the_running_mean_goes_before_the_last_weights(tmp_path: Path) -> None:
    run, runs = make_run(tmp_path), open_store(str(tmp_path / "runs"))
    means = {f"ema.{name}": t + 1 for name, t in WEIGHTS.items()}
    warm_start.prepare(checkpoint(tmp_path, **means), runs, run)
    found = warm_start.find(runs, run, "plan")
    assert found is not None
    sae = build_sae(run.sae, D_IN)
    warm_start.load(sae, found)
    assert warm_start.width(found) == N_KNOWN
    assert torch.equal(sae.b_enc[:N_KNOWN], WEIGHTS["b_enc"] + 1)
    assert torch.equal(sae.W_enc[:N_KNOWN], WEIGHTS["W_enc"] + 1)
    lengths = sae.W_dec[:N_KNOWN].norm(dim=1)  # a mean of unit rows is not a unit row
    torch.testing.assert_close(lengths, torch.ones(N_KNOWN))
    assert not sae.b_enc[N_KNOWN:].any()


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_a_shard_takes_its_latents_of_what_was_left(tmp_path: Path, shards: int) -> None:
    """Each shard loads its part of the copied latents.

    With 3 shards of 32 latents, the first two are known and the last is new.
    """
    run, runs = make_run(tmp_path), open_store(str(tmp_path / "runs"))
    warm_start.prepare(checkpoint(tmp_path), runs, run)
    found = warm_start.find(runs, run, "plan")
    assert found is not None
    parts = []
    for shard in range(shards):
        sae = build_sae(run.sae, D_IN, LatentAxis(shard=shard, shards=shards))
        warm_start.load(sae, found)
        parts.append(sae)
        for name in ("b_dec", "threshold"):
            assert torch.equal(sae.state_dict()[name], WEIGHTS[name])
    for name in ("W_enc", "W_dec", "b_enc"):
        whole = torch.cat([sae.state_dict()[name] for sae in parts])
        assert torch.equal(whole[:N_KNOWN], WEIGHTS[name])
        assert not whole[N_KNOWN:].nan_to_num().any()


def test_a_run_that_measures_may_begin_with_one_that_held_nothing_out(tmp_path: Path) -> None:
    measured = {"heldout_rows": 160, "keep_best": 1}
    run = load_run(write_run(tmp_path, sae=make_run(tmp_path).sae.model_dump(), train=measured))
    activations = NARROW["activations"] | {"heldout_share": 0.0}
    settings = run_fingerprint(validate_run(NARROW | {"activations": activations}, "narrow"))
    checkpoints = Checkpoints(open_store(str(tmp_path)), "narrow", 2)
    save(checkpoints, 30, WEIGHTS, SCALARS | {"run": settings})
    warm_start.check(checkpoints.open(30), run)


def test_what_was_left_last_counts(tmp_path: Path) -> None:
    """The last prepared copy is used, even if it is from an earlier step."""
    run, runs = make_run(tmp_path), open_store(str(tmp_path / "runs"))
    late = checkpoint(tmp_path)
    checkpoints = Checkpoints(open_store(str(tmp_path)), "narrow", 2)
    save(checkpoints, 10, WEIGHTS, SCALARS)
    for one in (late, checkpoints.open(10)):
        warm_start.prepare(one, runs, run)
    found = warm_start.find(runs, run, "plan")
    assert found is not None
    assert found.step == 10


def test_what_was_left_in_part_goes_too(tmp_path: Path) -> None:
    run, runs = make_run(tmp_path), open_store(str(tmp_path / "runs"))
    runs.put("world/warm-start/step-00000040/W_enc-000000000.safetensors", b"cut off")
    warm_start.prepare(checkpoint(tmp_path), runs, run)
    assert {key.split("/")[2] for key in runs.keys("world/warm-start/")} == {"step-00000030"}


def random_run(folder: Path, n_latents: int, **sections: Any) -> Run:
    """Return a run of a recipe with random initial directions."""
    sae = {"kind": "batchtopk", "n_latents": n_latents, "k": 3, "auxk": 16, "init": "random"}
    places = {"activations": str(folder / "a"), "runs": str(folder / "runs")}
    return load_run(write_run(folder, sae=sae, store=places | {"max_ahead_units": 25}, **sections))


def test_new_latents_must_have_rows_to_point_at(tmp_path: Path) -> None:
    run = random_run(tmp_path, 300, train={"rows": 160})
    with pytest.raises(ConfigError, match="160 rows are too few for 236 new"):
        warm_start.prepare(checkpoint(tmp_path), open_store(run.store.runs), run)


def test_rows_for_new_latents_count_for_how_far_producers_must_run_ahead(tmp_path: Path) -> None:
    """Rows needed for new latents raise the number of units that producers must run ahead.

    6,576 rows are in 18 units of about 367 rows, and the first windows have 8 units. Without new
    latents 2,640 rows would do, in 8 units.
    """
    run = random_run(tmp_path, 6000, corpus={"documents": 1000})
    plan(run)
    warm_start.prepare(checkpoint(tmp_path), open_store(run.store.runs), run)
    mesh, telemetry = Mesh(0, 1, torch.device("cpu"), WHOLE), Telemetry("world", "train", None)
    stopping = threading.Event()
    stopping.set()  # otherwise it would wait for the first unit
    watch = Watch(Ranks(0, 1, 0, ("here",)), stopping, lost_seconds=60, hung_seconds=60)
    for ask in (lambda: plan(run), lambda: train(run, mesh, watch, stopping, telemetry)):
        with pytest.raises(ConfigError, match=r"25 would block .* first 6576 rows need 34 units"):
            ask()


def test_a_dictionary_of_another_site_is_refused(tmp_path: Path) -> None:
    narrow = checkpoint(tmp_path)
    settings = narrow.scalars["run"]["activations"] | {"sites": ["resid_post.3", "resid_post.7"]}
    language = {
        "model": {"kind": "huggingface", "path": "m"},
        "corpus": {"kind": "files", "files": ["t.txt"]},
        "activations": settings,
    }
    narrow.scalars["run"] |= language | {"train": WORLD["train"] | {"site": "resid_post.3"}}
    sae = {"kind": "batchtopk", "n_latents": 96, "k": 3, "auxk": 16}
    train = {"site": "resid_post.7"}
    run = load_run(write_run(tmp_path, **language, sae=sae, train=train))
    with pytest.raises(ConfigError, match=r"resid_post.7 cannot start from .* of resid_post.3"):
        warm_start.prepare(narrow, open_store(str(tmp_path / "runs")), run)


def test_a_damaged_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    run, runs = make_run(tmp_path), open_store(str(tmp_path / "runs"))
    damaged = checkpoint(tmp_path)
    part = tmp_path / damaged.manifest.tensors["W_dec"].parts[0].key
    part.write_bytes(part.read_bytes()[:-1] + b"!")
    with pytest.raises(CorruptObjectError, match="W_dec-000000000"):
        warm_start.prepare(damaged, runs, run)
    assert warm_start.find(runs, run, "plan") is None


def test_activations_of_another_width_are_refused(tmp_path: Path) -> None:
    run, runs = make_run(tmp_path), open_store(str(tmp_path / "runs"))
    warm_start.prepare(checkpoint(tmp_path), runs, run)
    found = warm_start.find(runs, run, "plan")
    assert found is not None
    with pytest.raises(ConfigError, match="width 16, but got 8"):
        warm_start.load(build_sae(run.sae, 8), found)
