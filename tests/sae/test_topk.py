"""SCIENCE D1 for TopK with AuxK: loss and gradients against the dense oracle in fp64."""

import pytest
import torch
from torch import Tensor

from dist_sae.config.sae import TopKConfig
from dist_sae.sae.base import LossTerms, identity_sum
from dist_sae.sae.kernels import reference
from dist_sae.sae.kernels import torch as kernels
from dist_sae.sae.topk import TopK

D_IN, N_LATENTS, K, AUXK, BATCH = 16, 64, 5, 7, 32
VARIANCE = 11.0
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")


def make_sae(dtype: torch.dtype = torch.float64, **settings: float) -> TopK:
    config = TopKConfig.model_validate(
        {"n_latents": N_LATENTS, "k": K, "auxk": AUXK, "auxk_coefficient": 0.25} | settings
    )
    generator = torch.Generator().manual_seed(1)
    sae = TopK(config, D_IN, product_dtype=dtype, dtype=dtype)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return sae


def rows(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(2), dtype=dtype)


def some_dead() -> Tensor:
    return torch.arange(N_LATENTS) % 4 == 0


def oracle(sae: TopK, x: Tensor, dead: Tensor) -> LossTerms:
    return reference.topk_loss(
        x,
        sae.W_enc,
        sae.b_enc,
        sae.W_dec,
        sae.b_dec,
        k=sae.config.k,
        variance=VARIANCE,
        dead=dead,
        auxk=sae.config.auxk,
        auxk_coefficient=sae.config.auxk_coefficient,
    )


def gradients(sae: TopK, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*sae.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g
        for n, p, g in zip(names, parameters, found, strict=True)
    }


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float(((value - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("dead", ["none", "some", "all"])
def test_loss_and_gradients_equal_the_dense_reference(
    dtype: torch.dtype, bound: float, dead: str
) -> None:
    mask = {
        "none": torch.zeros(N_LATENTS).bool(),
        "some": some_dead(),
        "all": torch.ones(N_LATENTS).bool(),
    }
    sae, x = make_sae(dtype), rows(dtype)
    terms = sae.objective(x, VARIANCE, mask[dead], identity_sum).terms
    expected = oracle(sae, x, mask[dead])
    assert relative_error(terms.fvu, expected.fvu) <= bound
    assert relative_error(terms.total, expected.total) <= bound
    if dead != "none":
        assert relative_error(terms.auxk, expected.auxk) <= bound
    ours, theirs = gradients(sae, terms.total), gradients(sae, expected.total)
    for name in PARAMETERS:
        assert relative_error(ours[name], theirs[name]) <= bound, name


def test_chunks_of_latents_do_not_change_the_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = make_sae(), rows()
    whole = sae.encode(x)
    monkeypatch.setattr(kernels, "_CHUNK", 24)  # 24 + 24 + 16: the last one is short
    chunked = sae.encode(x)
    assert torch.equal(whole.latents, chunked.latents)
    torch.testing.assert_close(whole.acts, chunked.acts, rtol=1e-12, atol=0)


def test_auxk_gives_the_encoder_a_gradient() -> None:
    """A peer's AuxK leaves the encoder without one, and so revives nothing."""
    sae, dead = make_sae(), some_dead()
    auxk = sae.objective(rows(), VARIANCE, dead, identity_sum).terms.auxk
    found = gradients(sae, auxk)
    assert found["W_enc"][dead].norm() > 0
    assert found["b_enc"][dead].norm() > 0
    assert found["W_enc"][~dead].norm() == 0


def test_latents_selected_at_zero_get_no_gradient() -> None:
    sae = make_sae(auxk=0)
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)  # nothing is positive: all k selected latents are at zero
        sae.b_enc[3] = 100.0  # but for this one
    output = sae.objective(rows(), VARIANCE, torch.zeros(N_LATENTS).bool(), identity_sum)
    assert int((output.codes.acts > 0).sum()) == BATCH
    found = gradients(sae, output.terms.total)
    for name in ("W_enc", "b_enc", "W_dec"):
        others = torch.arange(N_LATENTS) != 3
        assert torch.equal(found[name][others], torch.zeros_like(found[name][others])), name
        assert found[name][3].norm() > 0


def test_auxk_does_not_count_the_bias_twice() -> None:
    """Shift the data and b_dec alike: the error is the same, so AuxK must be."""
    sae, x, dead = make_sae(), rows(), some_dead()
    before = sae.objective(x, VARIANCE, dead, identity_sum).terms.auxk
    with torch.no_grad():
        sae.b_dec.add_(3.0)
    after = sae.objective(x + 3.0, VARIANCE, dead, identity_sum).terms.auxk
    torch.testing.assert_close(before, after, rtol=1e-12, atol=0)


def test_auxk_is_zero_when_nothing_is_left_to_explain() -> None:
    sae = make_sae()
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.b_dec.fill_(2.0)
    terms = sae.objective(
        torch.full((BATCH, D_IN), 2.0).double(), VARIANCE, some_dead(), identity_sum
    ).terms
    assert terms.auxk == 0
    assert terms.fvu == 0


def test_fvu_by_hand() -> None:
    """Two latents along the axes, k = 1: x = (3, 1) keeps 3, loses 1; (0, 2) is kept whole."""
    sae = TopK(TopKConfig(n_latents=2, k=1, auxk=0), 2, torch.float64, torch.float64)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.eye(2))
    x = torch.tensor([[3.0, 1.0], [0.0, 2.0]]).double()
    output = sae.objective(x, 4.0, torch.zeros(2).bool(), identity_sum)
    # squared errors 1 and 0; divided by 2 rows x variance 4
    assert output.terms.fvu.item() == pytest.approx(1 / 8)
    assert output.codes.latents[:, 0].tolist() == [0, 1]
    assert output.codes.acts[:, 0].tolist() == [3.0, 2.0]


def test_loss_over_two_ranks_is_the_mean_of_their_losses() -> None:
    """Half of the batch on each rank, their sums added: as the whole batch on one (D2)."""
    sae, x, dead = make_sae(), rows(), some_dead()
    whole = sae.objective(x, VARIANCE, dead, identity_sum).terms.total
    halves = x.split(BATCH // 2)  # type: ignore[no-untyped-call]

    def statistics(half: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def spy(tensor: Tensor) -> Tensor:
            seen.append(tensor)
            return tensor

        sae.objective(half, VARIANCE, dead, spy)
        (only,) = seen
        return only

    total = statistics(halves[0]) + statistics(halves[1])
    parts = [sae.objective(half, VARIANCE, dead, lambda _: total).terms.total for half in halves]
    mean = (parts[0] + parts[1]) / 2
    assert relative_error(mean, whole) <= 1e-12
    ours, theirs = gradients(sae, mean), gradients(sae, whole)
    for name in PARAMETERS:
        assert relative_error(ours[name], theirs[name]) <= 1e-10, name


def test_bf16_products_select_nearly_the_same() -> None:
    """bf16 has 8 bits: the values agree to .4 %, so the reconstruction does to about that."""
    sae, x = make_sae(torch.float32), rows(torch.float32)
    exact = sae.objective(x, VARIANCE, some_dead(), identity_sum).terms.fvu
    sae.product_dtype = torch.bfloat16
    rough = sae.objective(x, VARIANCE, some_dead(), identity_sum).terms.fvu
    assert rough.item() == pytest.approx(exact.item(), rel=0.01)


def test_gradient_along_the_decoder_is_removed_and_rows_stay_unit() -> None:
    sae = make_sae()
    sae.constrain_parameters()
    sae.objective(rows(), VARIANCE, some_dead(), identity_sum).terms.total.backward()  # type: ignore[no-untyped-call]
    sae.constrain_gradients()
    assert sae.W_dec.grad is not None
    along = (sae.W_dec.grad * sae.W_dec).sum(1)
    torch.testing.assert_close(along, torch.zeros_like(along), atol=1e-12, rtol=0)
    torch.testing.assert_close(
        sae.W_dec.norm(dim=1), torch.ones(N_LATENTS).double(), atol=1e-12, rtol=0
    )
