"""The project's Adam, as the engine uses it, on small gradients and on rare ones."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_sae.config import load_run
from dist_sae.config.data import SyntheticModel
from dist_sae.dictionaries import build_sae
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.init import initialise_tied
from dist_sae.dictionaries.interface import StepContext
from dist_sae.distributed.engine import Engine, gradient_norm
from dist_sae.models.synthetic import SyntheticSource
from tests.dictionaries.recipes import sae_rows
from tests.runs import write_run

D_IN, N, L0, BATCH = 16, 64, 3, 160
WORLD = SyntheticSource(SyntheticModel(d_in=D_IN, n_features=48, l0=L0))


def rows(number: int, batch: int = BATCH) -> Tensor:
    x: Tensor = WORLD.intensities(number * batch, batch) @ WORLD.directions
    return x * math.sqrt(D_IN / L0)


def build(folder: Path, **train: Any) -> tuple[Dictionary, Engine]:
    run = load_run(write_run(folder, train=train))
    sae = build_sae(run.sae, D_IN)
    initialise_tied(sae, sae_rows(rows(0)), 0, rescale=False)
    return sae, Engine(run, sae)


def trained(folder: Path, factor: float, steps: int = 40, **train: Any) -> list[dict[str, Tensor]]:
    """Return the parameters after every step with a loss that is multiplied by `factor`."""
    sae, engine = build(folder, clip_norm=None, **train)
    dead = torch.arange(N) % 4 == 0
    seen = []
    for number in range(steps):
        output = engine.objective(
            sae_rows(rows(number)), StepContext(float(D_IN), dead, N // 4, progress=0.0)
        )
        engine.backward(factor * output.terms.total)
        engine.step(lr=1e-3)
        seen.append({name: p.detach().clone() for name, p in sae.named_parameters()})
    return seen


def test_the_norm_is_that_of_all_elements_however_many(tmp_path: Path) -> None:
    """The norm of a wide dictionary is accurate.

    Adding its squares one by one in fp32 would lose small ones.
    """
    run = load_run(write_run(tmp_path, sae={"n_latents": 2**17, "init": "random"}))
    sae = build_sae(run.sae, 256)
    for number, parameter in enumerate(sae.parameters()):
        parameter.grad = torch.full_like(parameter, 0.1 * (1 + number))
    wanted = math.sqrt(
        sum(
            float(p.grad[..., 0].double().square().max()) * p.numel()
            for p in sae.parameters()
            if p.grad is not None
        )
    )
    assert gradient_norm(sae) == pytest.approx(wanted, rel=1e-6)


def apart(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> float:
    """Return the largest relative distance between two trajectories, over steps and parameters."""
    return max(
        float((here[name] - there[name]).norm() / here[name].norm())
        for here, there in zip(one, other, strict=True)
        for name in ("W_enc", "W_dec", "b_enc")
    )


@pytest.mark.system
def test_the_scale_of_the_loss_does_not_matter(tmp_path: Path) -> None:
    """Adam cancels the loss's scale as long as eps is far below the gradients.

    Clipping depends on the scale, so it is off. The encoder starts at unit length. With the encoder
    scale of real training, the gradients of some biases, which start at zero, are smaller still,
    and b_enc differs by 2.3 % at a factor of 1e-3 (the weights by 9e-4). Here elements of the
    gradient are 1e-2 to 1e-5. At a factor of 1e-3 the smallest come near eps, and are below the
    usual eps of 1e-8.
    """
    reference = trained(tmp_path, 1.0)
    for factor in (1e-3, 1e2, 1e4):
        assert apart(reference, trained(tmp_path, factor)) < 1e-3, factor
    usual = [trained(tmp_path, factor, eps=1e-8) for factor in (1.0, 1e-3)]
    assert apart(*usual) > 5e-3


def firings(sae: Dictionary, engine: Engine, every: int, n: int, *, lr: float) -> float:
    """Return how far one element of W_enc moves for the last of `n` firings, `every` steps apart.

    The distance is in units of lr. Gradients are set by hand: the element's gradient is 1e-3 when
    its latent fires, else 0.
    """
    weight, before = sae.W_enc, 0.0
    for step in range(every * n):
        for parameter in sae.parameters():
            parameter.grad = torch.zeros_like(parameter)
        if step % every == 0:
            before = weight[1, 0].item()
            assert weight.grad is not None
            weight.grad[1, 0] = 1e-3
        engine.step(lr)
    return (before - weight[1, 0].item()) / lr


@pytest.mark.system
@pytest.mark.parametrize(("every", "n", "published"), [(100, 60, 10.0), (1000, 9, 25.0)])
def test_a_rare_latent_moves_as_with_dense_adam(
    tmp_path: Path, every: int, n: int, published: float
) -> None:
    """A latent's moments decay while it does not fire, and keep moving its weights.

    For a gradient g once in T steps, j steps later m = (1 - b1) g b1^j and v = (1 - b2) g^2 b2^j /
    (1 - b2^T). Over all j, m / sqrt(v) adds up to (1 - b1) / sqrt(1 - b2) / (1 - b1 / sqrt(b2)) *
    sqrt(1 - b2^T). An optimizer that updates only rows with entries moves by 1 lr or 3.2 lr
    instead.
    """
    sae, engine = build(tmp_path, clip_norm=None)
    with torch.no_grad():
        sae.W_enc.zero_()
    b1, b2 = 0.9, 0.999
    steady = (1 - b1) / math.sqrt(1 - b2) / (1 - b1 / math.sqrt(b2)) * math.sqrt(1 - b2**every)
    assert steady == pytest.approx(published, rel=0.03)
    assert firings(sae, engine, every, n, lr=1e-6) == pytest.approx(steady, rel=0.01)


def test_a_latent_that_fires_once_in_very_many_steps_moves_by_31_8(tmp_path: Path) -> None:
    """The limit for T >= 1e4 steps late in a run, when moments are zero and bias correction has
    faded.
    """
    sae, engine = build(tmp_path, clip_norm=None)
    with torch.no_grad():
        sae.W_enc.zero_()
    zeros = {
        p: {m: torch.zeros_like(p) for m in ("exp_avg", "exp_avg_sq")} for p in sae.parameters()
    }
    engine.restore(100_000, zeros)
    assert firings(sae, engine, 200, 1, lr=1e-6) == pytest.approx(31.8, rel=0.005)


def test_a_latent_that_does_not_fire_is_pushed_on_by_the_engine(tmp_path: Path) -> None:
    """The recipe's own gradients are used: one latent fires on the first batch, and then never
    again.
    """
    sae, engine = build(tmp_path, clip_norm=None)
    quiet, none_dead = 5, torch.zeros(N, dtype=torch.bool)
    with torch.no_grad():
        sae.b_enc[quiet] = 100.0
    now = StepContext(float(D_IN), none_dead, 0, progress=0.0)
    engine.backward(engine.objective(sae_rows(rows(0)), now).terms.total)
    gradient = sae.W_enc.grad
    assert gradient is not None
    first = gradient[quiet].double()
    engine.step(lr=1e-5)
    with torch.no_grad():
        sae.b_enc[quiet] = -1e6
    position, m, v = sae.W_enc.detach()[quiet].double(), 0.1 * first, 0.001 * first.square()
    for step in range(2, 12):
        output = engine.objective(sae_rows(rows(step)), now)
        assert not output.fired[quiet]
        engine.backward(output.terms.total)
        engine.step(lr=1e-5)
        m, v = 0.9 * m, 0.999 * v
        unbiased = m / (1 - 0.9**step), v / (1 - 0.999**step)
        position = position - 1e-5 * unbiased[0] / (unbiased[1].sqrt() + 6.25e-10)
        # fp32 near 1 has a spacing of 1e-7 and rounds ten times, while a step moves the weight by
        # 1e-5
        torch.testing.assert_close(sae.W_enc.detach()[quiet].double(), position, rtol=0, atol=1e-6)


@pytest.mark.system
def test_products_in_bf16_train_as_well_as_in_fp32(tmp_path: Path) -> None:
    """Both train on the same batches, and are measured on the same separate rows in fp32."""
    fvus = []
    for dtype in (torch.float32, torch.bfloat16):
        sae, engine = build(tmp_path)
        sae.product_dtype = dtype
        dead = torch.zeros(N, dtype=torch.bool)
        for number in range(200):
            output = engine.objective(
                sae_rows(rows(number)), StepContext(float(D_IN), dead, 0, progress=0.0)
            )
            engine.backward(output.terms.total)
            engine.step(lr=3e-3)
        x = rows(1, 8192)
        error = x - sae.decode(sae.encode(x), x)
        fvus.append(float((error.square().sum() / (x - x.mean(0)).square().sum()).detach()))
    assert fvus[0] < 0.5
    assert fvus[1] == pytest.approx(fvus[0], abs=0.002)
