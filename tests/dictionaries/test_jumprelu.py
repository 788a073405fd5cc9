"""JumpReLU with a target L0, and the precision of its thresholds."""

import pytest
import torch
from torch import Tensor

from dist_sae.config.sae import JumpReLUConfig
from dist_sae.dictionaries import penalised
from dist_sae.dictionaries.axis import WHOLE, LatentAxis
from dist_sae.dictionaries.recipes.jumprelu import JumpReLU
from tests.dictionaries.ranks import on_ranks
from tests.dictionaries.recipes import (
    CONFIGS,
    N_LATENTS,
    check_against_oracle,
    gradients,
    make,
    rows,
    sae_rows,
    step,
)

TARGET = JumpReLUConfig(n_latents=N_LATENTS, target_l0=5.5, initial_threshold=0.2, bandwidth=0.15)


@pytest.mark.parametrize("sparse_below", [0.0, 1.0])
def test_a_target_has_the_loss_and_the_gradients_of_the_dense_reference(
    sparse_below: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(penalised, "SPARSE_BELOW", sparse_below)
    check_against_oracle(make(TARGET), "none", 1e-9)


@pytest.mark.parametrize(("progress", "aim"), [(0.0, 11.0), (0.05, 8.25), (0.1, 5.5), (0.9, 5.5)])
def test_the_aimed_l0_goes_from_the_initial_one_to_the_target(progress: float, aim: float) -> None:
    """The aimed L0 falls from twice the target to the target.

    The penalty pulls L0 toward the aim from both sides and has no gradient at the aim.
    """
    sae = make(TARGET)
    assert isinstance(sae, JumpReLU)
    pulls: list[Tensor] = []
    for l0 in (0.5 * aim, aim, 2 * aim):
        active = torch.tensor(l0, requires_grad=True)
        penalty = sae.sparsity(active, progress)
        assert float(penalty.detach()) == pytest.approx(4 * (l0 / aim - 1) ** 2)
        pulls += torch.autograd.grad(penalty, active)
    assert [float(pull) for pull in pulls] == pytest.approx([-4 / aim, 0, 8 / aim])


@pytest.mark.parametrize(("replicas", "shards"), [(1, 2), (2, 1), (2, 2), (1, 4)])
def test_l0_is_counted_over_all_shards_and_replicas(replicas: int, shards: int) -> None:
    """A replica's ranks add their penalties up to the whole; gradients average over replicas."""

    def penalty(axis: LatentAxis = WHOLE) -> tuple[Tensor, Tensor]:
        sae, parts = make(TARGET, axis=axis), axis.replicas * axis.shards
        x = rows().chunk(parts)[axis.replica * axis.shards + axis.shard]
        found = sae.objective(sae_rows(x), step(torch.zeros(len(sae.W_enc), dtype=torch.bool)))
        return found.terms.sparsity.detach(), gradients(sae, found.terms.sparsity)["theta"]

    whole, ranks = penalty(), on_ranks(replicas, shards, penalty)
    torch.testing.assert_close(sum(value for value, _ in ranks) / replicas, whole[0])
    of_ranks = torch.stack([gradient for _, gradient in ranks]).view(replicas, -1)
    torch.testing.assert_close(of_ranks.mean(0), whole[1])


def test_thresholds_stay_precise_whatever_the_products_are() -> None:
    """Thresholds stay in fp32 when products are in bf16.

    At a wide dictionary's learning rate, a bf16 threshold of .2 would never move, because its last
    bit is worth 2^-10.
    """
    sae, x = make(CONFIGS["jumprelu"], torch.float32), rows(torch.float32)
    assert isinstance(sae, JumpReLU)
    sae.product_dtype = torch.bfloat16
    with torch.no_grad():
        sae.theta.fill_(0.2)
    optimizer = torch.optim.Adam([sae.theta], lr=1e-6)
    for _ in range(10):
        optimizer.zero_grad()
        sae.objective(sae_rows(x), step()).terms.total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    moved = (sae.theta.detach() - 0.2).abs()
    assert sae.theta.dtype == torch.float32
    assert float(moved.max()) == pytest.approx(1e-5, rel=0.05)
