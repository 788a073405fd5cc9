"""Training state, saved and restored for every recipe."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.checkpoint.state import TrainingState, load_weights
from dist_sae.config import Run, load_run
from dist_sae.dictionaries.axis import WHOLE, LatentAxis
from dist_sae.dictionaries.dead import DeadLatents
from dist_sae.dictionaries.ema import WeightAverage
from dist_sae.dictionaries.interface import StepContext
from dist_sae.distributed.engine import Engine
from dist_sae.storage import open_store
from tests.dictionaries.recipes import (
    BATCH,
    CONFIGS,
    D_IN,
    KINDS,
    N_LATENTS,
    UNIT_ROWS,
    VARIANCE,
    make,
    sae_rows,
)
from tests.runs import write_run

DEAD_AFTER = 2 * BATCH


RECIPES = CONFIGS | {"routed": CONFIGS["routed"].model_copy(update={"balance": "bias"})}
"""Every recipe, with all state that a step can change."""


def make_run(folder: Path, kind: str) -> Run:
    # nothing is read, so the recipe's sites need not exist
    return load_run(write_run(folder)).model_copy(update={"sae": RECIPES[kind]})


def make_state(run: Run, kind: str, axis: LatentAxis = WHOLE) -> TrainingState:
    sae = make(RECIPES[kind], torch.float32, axis)
    # a buffer per latent, since no recipe has one yet
    numbers = torch.arange(len(sae.W_enc)) + sae.first_latent
    sae.add_tensor("numbers", numbers.float(), per_latent=True)
    dead = DeadLatents(len(sae.W_enc), DEAD_AFTER, axis)
    return TrainingState(sae, Engine(run, sae), dead, WeightAverage(sae, 0.9))


def advance(state: TrainingState, steps: range) -> list[float]:
    losses = []
    for number in steps:
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(BATCH, D_IN, generator=generator)
        now = StepContext(VARIANCE, state.dead.mask, state.dead.count, progress=number / 10)
        engine = state.engine
        assert isinstance(engine, Engine)
        output = engine.objective(sae_rows(x), now)
        engine.backward(output.terms.total)
        losses += [float(output.terms.total.detach()), *engine.step(lr=1e-2)]
        state.dead.update(output.fired, BATCH)
        assert state.average is not None
        state.average.update(sae_rows(x), number / 10)
    return losses


def tensors(state: TrainingState) -> dict[str, Tensor]:
    return {piece.name: piece.rows.clone() for piece in state.pieces()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_goes_on_from_its_checkpoint_bitwise(tmp_path: Path, kind: str) -> None:
    run = make_run(tmp_path, kind)
    state = make_state(run, kind)
    advance(state, range(4))
    checkpoints = Checkpoints(open_store(str(tmp_path)), "run", keep=1)
    checkpoints.commit(4, [checkpoints.write(4, state.pieces())], {})
    expected = advance(state, range(4, 9))

    again = make_state(run, kind)
    again.read(checkpoints.open(4))()
    assert advance(again, range(4, 9)) == expected
    one, other = tensors(state), tensors(again)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_takes_its_rows_and_gives_them_back(tmp_path: Path, kind: str) -> None:
    """State moves from one shard to two and back to one."""
    run = make_run(tmp_path, kind)
    state = make_state(run, kind)
    advance(state, range(3))
    checkpoints = Checkpoints(open_store(str(tmp_path)), "run", keep=2)
    checkpoints.commit(3, [checkpoints.write(3, state.pieces())], {})
    whole = tensors(state)

    records = []
    for shard in range(2):
        part = make_state(run, kind, LatentAxis(shard=shard, shards=2))
        part.sae.get_buffer("numbers").zero_()
        part.read(checkpoints.open(3))()
        half = N_LATENTS // 2
        own = slice(half * shard, half * (shard + 1))
        assert torch.equal(part.sae.W_dec, whole["W_dec"][own])
        assert torch.equal(part.sae.b_dec, whole["b_dec"])
        assert torch.equal(part.dead.idle_rows, whole["idle_rows"][own])
        numbers = torch.arange(N_LATENTS)[own].float()
        assert torch.equal(part.sae.get_buffer("numbers"), numbers)
        assert part.average is not None
        assert torch.equal(part.average.mean["numbers"], numbers)
        moment = part.engine.moment(part.sae.W_enc, "exp_avg_sq")
        assert torch.equal(moment, whole["exp_avg_sq.W_enc"][own])
        records.append(checkpoints.write(4, part.pieces()))
    checkpoints.commit(4, records, {})
    checkpoint = checkpoints.open(4)
    assert checkpoint.manifest.tensors.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(checkpoint.read(name), tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_inference_takes_the_running_mean(tmp_path: Path, kind: str) -> None:
    state = make_state(make_run(tmp_path, kind), kind)
    advance(state, range(5))
    checkpoints = Checkpoints(open_store(str(tmp_path)), "run", keep=2)
    checkpoints.commit(5, [checkpoints.write(5, state.pieces())], {})
    checkpoints.commit(6, [checkpoints.write(6, state._replace(average=None).pieces())], {})
    assert state.average is not None
    run = make_run(tmp_path, kind)
    mean, last = make_state(run, kind).sae, make_state(run, kind).sae
    load_weights(mean, checkpoints.open(5))
    load_weights(last, checkpoints.open(6))
    for name, tensor in mean.state_dict().items():
        torch.testing.assert_close(tensor, state.average.mean[name])
    for name, tensor in last.state_dict().items():
        torch.testing.assert_close(tensor, state.sae.state_dict()[name])
    if kind in UNIT_ROWS:
        torch.testing.assert_close(mean.W_dec.norm(dim=1), torch.ones(N_LATENTS))


def test_a_mean_without_its_threshold_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A running mean without its threshold, as in older checkpoints, is not used for inference.

    Training resumes from such a checkpoint, with the last threshold as the mean's.
    """
    run = make_run(tmp_path, "batchtopk")
    state = make_state(run, "batchtopk")
    advance(state, range(5))
    checkpoints = Checkpoints(open_store(str(tmp_path)), "run", keep=1)
    old = [piece for piece in state.pieces() if piece.name != "ema.threshold"]
    checkpoints.commit(5, [checkpoints.write(5, old)], {})
    sae = make_state(run, "batchtopk").sae
    load_weights(sae, checkpoints.open(5))
    assert torch.equal(sae.W_enc, state.sae.W_enc)
    assert "the running mean lacks threshold, so the last weights are used" in caplog.text
    again = make_state(run, "batchtopk")
    again.read(checkpoints.open(5))()
    assert again.average is not None
    assert again.average.updates == 5
    assert torch.equal(again.average.mean["threshold"], state.sae.get_buffer("threshold"))


@pytest.mark.parametrize(("scalars", "expected"), [({"ema_updates": 2}, 2), ({}, 5)])
def test_a_mean_knows_how_much_it_has_taken_in(
    tmp_path: Path, scalars: dict[str, int], expected: int
) -> None:
    """The running mean's number of updates is restored.

    In a run that started from another one, the mean may be younger than Adam's state. Older
    checkpoints do not store the number.
    """
    run = make_run(tmp_path, "topk")
    state = make_state(run, "topk")
    assert state.average is not None
    advance(state, range(3))
    state.average.updates = 0
    advance(state, range(3, 5))
    assert state.scalars() == {"ema_updates": 2}
    checkpoints = Checkpoints(open_store(str(tmp_path)), "run", keep=1)
    checkpoints.commit(5, [checkpoints.write(5, state.pieces())], scalars)
    again = make_state(run, "topk")
    again.read(checkpoints.open(5))()
    assert again.average is not None
    assert again.average.updates == expected


def test_what_ranks_do_together_comes_before_the_first_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Collectives run before the first piece is written.

    A rank whose write fails takes no further piece, so a later collective would hang the others.
    """
    state = make_state(make_run(tmp_path, "batchtopk"), "batchtopk")
    advance(state, range(3))
    pieces = state.pieces()
    next(pieces)

    def late(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(type(state.sae), "measure", late)
    assert "ema.threshold" in {piece.name for piece in pieces}
