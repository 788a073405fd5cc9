"""Starts, failures, damaged checkpoints and reported numbers of training.

The tests use real processes with one thread per rank.
"""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.checkpoint.lineage import Lineage
from dist_sae.checkpoint.maintenance import convert_to_run
from dist_sae.config import load_run
from dist_sae.config.sae import BatchTopKConfig
from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.normaliser import measure
from dist_sae.data.plan import load_plan
from dist_sae.data.shard import read_manifest
from dist_sae.dictionaries import build_sae
from dist_sae.dictionaries.axis import WHOLE
from dist_sae.dictionaries.init import initialise_from_data
from dist_sae.dictionaries.normaliser import SiteNormalisers
from dist_sae.distributed.mesh import Mesh
from dist_sae.errors import ConfigError, PlanMismatchError
from dist_sae.evaluation.evaluate import evaluate
from dist_sae.evaluation.facts import run_facts, unit_totals
from dist_sae.precision import is_emulated
from dist_sae.producing.planner import plan
from dist_sae.report.build import report
from dist_sae.storage import open_store
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.training.batches import FirstBatches, open_loader
from dist_sae.training.clock import Times
from dist_sae.training.setup import initialise
from dist_sae.training.start import Start, cursors_of, find_checkpoints
from tests.dictionaries.recipes import sae_rows
from tests.launch import produce, run, train
from tests.runs import write_run
from tests.training.trained import (
    SHARDED,
    STEPS,
    check_close,
    check_same,
    final,
    history,
    run_file,
)
from tests.world import only, save

pytestmark = pytest.mark.system


def test_directions_from_data_take_as_many_batches_as_they_need(
    tmp_path: Path, activations: str
) -> None:
    """64 latents need two and two thirds batches of 24 rows."""
    path = run_file(tmp_path, activations, train={"batch_rows": 24})
    settings = load_run(path)
    store = open_store(settings.store.activations)
    activation_set = ActivationSet(
        store, load_plan(store, settings), settings.sites, threading.Event()
    )
    measured = measure(activation_set, 2000)
    normalisers = SiteNormalisers(settings.reads, settings.writes, measured)
    sae = build_sae(settings.sae, 16)
    mesh = Mesh(0, 1, torch.device("cpu"), WHOLE)
    times = Times(mesh.device, {"world": Telemetry("world", "train", None)})
    again = build_sae(settings.sae, 16)
    with open_loader(settings, mesh, activation_set, range(5), Lineage(), None) as loader:
        batches = FirstBatches(3, loader, mesh, activation_set.stopping, times, several=True)
        for each in (sae, again):  # the second one uses the batches that the first has read
            initialise(settings, normalisers, each, Start(), batches)
        # training reads these batches and continues with the same loader
        assert batches.loader() is loader
        read = list(loader)
    assert [batch.step for batch in read] == [0, 1, 2, 3, 4]
    assert torch.equal(sae.W_dec, again.W_dec)
    acts = torch.cat([only(batch.acts) for batch in read])[:64]
    rows = acts * normalisers.by_site[settings.site].scale
    expected = build_sae(settings.sae, 16)
    expected.initialise(sae_rows(rows[:24]), settings.train.seed)
    initialise_from_data(expected, [sae_rows(rows)])
    torch.testing.assert_close(sae.W_dec, expected.W_dec)


def test_a_wider_dictionary_begins_with_a_narrower_one(
    tmp_path: Path, activations: str, calm: Path
) -> None:
    """The wider run starts from where the narrower one ended, on one rank and on two shards."""
    old = load_run(run_file(calm, activations))
    folders = [tmp_path / name for name in ("one", "shards")]
    wider = {"sae": {"n_latents": 96}, "train": {"rows": 1600}}
    paths = [run_file(folder, activations, **wider) for folder in folders]
    for path in paths:
        converted = convert_to_run(old, load_run(path), step=None)
        assert (converted["known_latents"], converted["new_latents"]) == (64, 32)
    train(paths[0])
    train(paths[1], *SHARDED, world=2)
    check_close(*map(final, folders))
    narrow, wide = history(calm), history(folders[0])
    assert wide[0]["fvu"] < 1.2 * narrow[-1]["fvu"]
    # batches differ by more than the two dictionaries do
    assert evaluate(load_run(paths[0]))["fvu"] < evaluate(old)["fvu"]
    cosines = (final(folders[0]).read("W_dec")[:64] * final(calm).read("W_dec")).sum(1)
    assert float(cosines.median()) > 0.99  # latent 17 is still latent 17
    with pytest.raises(ConfigError, match="world: has already been trained; choose another name"):
        convert_to_run(old, load_run(paths[0]), step=None)


def test_what_a_run_begins_with_must_fit_it(tmp_path: Path, activations: str, calm: Path) -> None:
    """This is checked again when the run starts, because the run file may have changed."""
    old = load_run(run_file(calm, activations))
    for section, problem in (
        (
            {"n_latents": 32},
            "world: sae.n_latents: 32 is less than the 64 latents of the initial",
        ),
        ({"kind": "relu", "n_latents": 96}, "world: sae.kind: relu cannot start from the weights"),
    ):
        new = load_run(run_file(tmp_path, activations, sae=section))
        with pytest.raises(ConfigError, match=problem):
            convert_to_run(old, new, step=None)
    convert_to_run(old, load_run(run_file(tmp_path, activations)), step=None)
    path = run_file(tmp_path, activations, sae={"n_latents": 32})
    assert "sae.n_latents: 32 is less than the 64" in run("train", str(path), code=2)


def test_a_running_mean_of_the_weights_is_resumed_and_evaluated(
    tmp_path: Path, activations: str, calm: Path
) -> None:
    """The resumed mean is bitwise equal, and averaging does not change the trained weights."""
    decay = {"ema_decay": 0.9}
    folders = [tmp_path / name for name in ("undisturbed", "stopped", "as weights")]
    paths = [run_file(folder, activations, train=decay) for folder in folders[:2]]
    train(paths[0])
    train(paths[1], stop_at=20)
    train(paths[1])
    checkpoint = final(folders[0])
    check_same(checkpoint, final(folders[1]))
    for name, tensor in final(calm).tensors.items():
        assert torch.equal(tensor, checkpoint.read(name)), name

    as_weights = load_run(run_file(folders[2], activations, train=decay))
    tensors = {name: checkpoint.read(name) for name in final(calm).manifest.tensors}
    means = {name: checkpoint.read(f"ema.{name}") for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    store = Checkpoints(open_store(as_weights.store.runs), "world", 2)
    save(store, STEPS, tensors | means, checkpoint.scalars)
    fvu = evaluate(load_run(paths[0]))["fvu"]
    assert fvu == pytest.approx(evaluate(as_weights)["fvu"], rel=1e-6)
    calm_fvu = evaluate(load_run(run_file(calm, activations)))["fvu"]
    assert abs(fvu - calm_fvu) > 1e-3 * calm_fvu


def test_training_lowers_fvu_and_auxk_takes_part(tmp_path: Path, activations: str) -> None:
    train(run_file(tmp_path, activations, sae={"init": "random"}))
    records = history(tmp_path)
    assert records[-1]["fvu"] < 0.75 * records[0]["fvu"]
    assert any(record["auxk_loss"] > 0 for record in records)


def test_other_settings_under_the_same_name_are_refused(activations: str, calm: Path) -> None:
    path = run_file(calm, activations)
    error = run("train", str(path), "--set", "train.lr=0.5", code=2)
    assert "train.lr: 0.003 -> 0.5" in error
    assert error.count("error:") == 1
    # settings of logging are free to change
    run("train", str(path), "--set", "train.log_every_steps=7")


def test_a_run_does_not_go_on_with_another_activation_set(
    tmp_path: Path, activations: str, calm: Path
) -> None:
    """`store` may change between two starts because a set may move, but it must be the same set."""
    run = load_run(run_file(calm, activations))
    runs = open_store(str(calm / "runs"))
    checkpoints = Checkpoints(runs, "world", 2)
    alone = Mesh(0, 1, torch.device("cpu"), WHOLE)
    (saved,) = find_checkpoints(
        checkpoints, runs, run, load_plan(open_store(activations), run), alone
    )
    assert sorted(cursors_of(saved)) == [0, 1, 2, 3]
    other = plan(load_run(write_run(tmp_path, activations={"seed": 1})))
    with pytest.raises(PlanMismatchError, match="was trained on a different activation set"):
        find_checkpoints(checkpoints, runs, run, other, alone)


def test_checkpoints_tell_their_held_out_fvu(tmp_path: Path, activations: str, calm: Path) -> None:
    """The FVU equals what `evaluate` measures on the same rows, and measuring does not change
    training.
    """
    settings = {"heldout_rows": 200, "keep_best": 1, "save_every_steps": 20}
    path = run_file(tmp_path, activations, train=settings, evaluate={"rows": 200})
    train(path, *SHARDED, world=2)
    saved = final(tmp_path)
    assert saved.scalars["heldout_fvu"] == pytest.approx(evaluate(load_run(path))["fvu"], rel=1e-4)
    train(run_file(tmp_path / "one", activations, train=settings))
    check_same(final(calm), final(tmp_path / "one"))
    (one, other) = (final(f).scalars["heldout_fvu"] for f in (tmp_path, tmp_path / "one"))
    assert one == pytest.approx(other, rel=1e-4)


def test_held_out_fvu_is_that_of_the_running_mean(tmp_path: Path, activations: str) -> None:
    """The running mean has its own threshold, so as many latents are active as training keeps.

    Latents that did not fire on the last batch are idle. They are dead only if they do not fire in
    the evaluation either.
    """
    settings = {"heldout_rows": 200, "ema_decay": 0.9}
    sae = {"kind": "batchtopk", "n_latents": 64, "k": 4, "auxk": 0, "dead_after_rows": 1}
    path = run_file(tmp_path, activations, sae=sae, train=settings, evaluate={"rows": 200})
    train(path)
    found, run = evaluate(load_run(path)), load_run(path)
    assert final(tmp_path).scalars["heldout_fvu"] == pytest.approx(found["fvu"], rel=1e-5)
    assert isinstance(run.sae, BatchTopKConfig)
    assert found["l0"] == pytest.approx(run.sae.k, rel=0.1)
    assert 0 < (final(tmp_path).read("idle_rows") > 0).double().mean() > found["dead_share"]
    assert found["dead_share"] <= found["never_fired"] / 64


def test_ranks_go_on_from_a_checkpoint_that_all_can_read(tmp_path: Path, activations: str) -> None:
    """If one rank cannot read a checkpoint, all ranks skip it."""
    path = run_file(tmp_path, activations, train={"save_every_steps": 8, "keep_checkpoints": 3})
    train(path, stop_at=20)
    settings, runs = load_run(path), open_store(str(tmp_path / "runs"))
    checkpoints = Checkpoints(runs, "world", 3)
    newest = max(checkpoints.steps())

    class OneOfTwo(Mesh):
        def all_gather_objects(self, value: Any, kind: Any = Any) -> list[Any]:  # noqa: ARG002
            return [value, value - {newest}]

    mesh = OneOfTwo(0, 2, torch.device("cpu"), WHOLE)
    plan_ = load_plan(open_store(activations), settings)
    found = find_checkpoints(checkpoints, runs, settings, plan_, mesh)
    assert [checkpoint.step for checkpoint in found] == [16, 8]


@pytest.mark.parametrize("damage", ["a part of the second rank", "manifest", "a part is gone"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, activations: str, sharded: Path, damage: str
) -> None:
    """The damage is logged, all ranks fall back, and the result is the same."""
    settings = {"save_every_steps": 8, "keep_checkpoints": 100}
    path = run_file(tmp_path, activations, train=settings)
    train(path, *SHARDED, world=2, stop_at=20)
    store = open_store(str(tmp_path / "runs"))
    newest = max(Checkpoints(store, "world", 2).steps())
    name = "manifest.json" if damage == "manifest" else "W_dec-000000032.safetensors"
    key = f"world/checkpoints/step-{newest:08d}/{name}"
    data = store.get(key)
    store.delete(key)
    if damage != "a part is gone":
        store.put(key, data[:-1] + bytes([data[-1] ^ 1]))
    errors = train(path, *SHARDED, world=2)
    assert name in "".join(errors)
    assert "resuming at step 16" in errors[0]
    # the damaged checkpoint is not one of the kept ones
    assert Checkpoints(store, "world", 2).steps() == [*range(8, STEPS, 8), STEPS]
    check_same(final(sharded), final(tmp_path))


def test_a_run_without_a_whole_checkpoint_does_not_begin_again(
    tmp_path: Path, activations: str
) -> None:
    path = run_file(tmp_path, activations)
    train(path, stop_at=5)
    for manifest in (tmp_path / "runs/world/checkpoints").glob("*/manifest.json"):
        manifest.write_bytes(manifest.read_bytes()[:-9])
    error = run("train", str(path), code=2)
    assert "no checkpoint is intact" in error


def test_a_routed_run_tells_how_its_experts_fare_and_resumes_bitwise(
    tmp_path: Path, activations: str
) -> None:
    sae = {"kind": "routed", "experts": 4, "n_latents": 64, "k": 3, "auxk": 16}
    sae |= {"balance": "bias", "capacity": 1.25, "dead_after_rows": 480}
    for name in ("calm", "stopped"):
        (tmp_path / name).mkdir()
        path = run_file(tmp_path / name, activations, sae=sae)
        if name == "stopped":
            train(path, *SHARDED, world=2, stop_at=20)
        train(path, *SHARDED, world=2)
    check_same(final(tmp_path / "calm"), final(tmp_path / "stopped"))
    last = history(tmp_path / "calm")[-1]
    assert 1 <= last["expert_load_ratio"] < 4
    assert last["idle_experts"] == 0
    assert 0 <= last["dead_share"] <= last["expert_dead_share"] <= 1
    found = evaluate(load_run(tmp_path / "calm/run.yaml"))
    shares = found["dead_share_by_expert"]
    assert max(shares) == last["expert_dead_share"]
    assert sum(shares) / 4 == found["dead_share"] == pytest.approx(last["dead_share"])


def test_a_matryoshka_run_tells_the_fvu_of_each_prefix(tmp_path: Path, activations: str) -> None:
    sae = {"kind": "matryoshka", "n_latents": 64, "k": 3, "auxk": 16, "prefixes": [0.25, 32]}
    error = run("train", str(run_file(tmp_path, activations, sae=sae)), code=2)
    assert "sae: prefixes: 0.25 of n_latents (64) is 0.25 latents; give shares" in error
    sae["prefixes"] = [16, 32]
    train(run_file(tmp_path, activations, sae=sae), *SHARDED, world=2)
    last = history(tmp_path)[-1]
    assert list(last["prefix_fvu"]) == ["16", "32", "64"]
    assert last["prefix_fvu"]["16"] > last["prefix_fvu"]["32"] > last["prefix_fvu"]["64"]
    assert last["prefix_fvu"]["64"] == pytest.approx(last["fvu"])


def test_too_little_data_is_said_before_the_first_step(tmp_path: Path, activations: str) -> None:
    settings = {"max_passes": 1, "products": "bf16"}
    error = run("train", str(run_file(tmp_path, activations, train=settings)), code=2)
    assert "train.rows asks for 9600 rows" in error
    # a precision that is slow on this machine is reported too
    assert ("train.products: bf16" in error) == is_emulated("bf16", torch.device("cpu"))
    assert not list((tmp_path / "runs").rglob("*"))


def test_a_run_gets_the_rows_that_its_plan_promised(tmp_path: Path) -> None:
    """If rows are excluded by norm, which no plan can predict, other rows are read again.

    The streams have 47 or 48 documents of 31 rows. The plan promises 4 x 1,457 rows, and 36 batches
    take 4 x 1,440.
    """
    path = write_run(
        tmp_path,
        activations={"exclude": {"over_norm": 1.6}},
        train={"rows": "all", "max_passes": 1, "save_every_steps": 35},
    )
    produce(path)
    said = train(path)[0]
    assert [r["step"] for r in history(tmp_path)] == list(range(1, 4 * 47 * 31 // 160 + 1))
    assert "because more rows were excluded; rereading its last window" in said
    run_ = load_run(tmp_path / "runs/world/run.yaml")
    assert run_.train.rows == 36 * 160
    assert run_.left_open == []
    store = open_store(run_.store.activations)
    made = load_plan(store, run_)
    rows = [sum(read_manifest(store, u).rows for u in made.stream_units(v)) for v in range(4)]
    again = sum(1440 - n for n in rows)
    assert 0 < again < 0.05 * sum(rows)
    assert (
        run_facts(run_, made, unit_totals(store, made), final(tmp_path))["repeated_rows"] == again
    )
    assert f"{again} were reread" in Path(report(run_)).read_text()
    train(path)  # nothing remains to do
    Checkpoints(open_store(run_.store.runs), "world", 2).delete(36)
    train(path)  # only the last step; some of the 35 steps before it repeated rows
    assert final(tmp_path).scalars["repeated_rows"] == again


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
