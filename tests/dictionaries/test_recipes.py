"""Losses and gradients of every recipe against a dense reference."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from dist_sae.config.sae import JumpReLUConfig, ReLUConfig, TopKConfig
from dist_sae.dictionaries import base, penalised
from dist_sae.dictionaries.axis import WHOLE, LatentAxis
from dist_sae.dictionaries.init import geometric_median
from dist_sae.dictionaries.interface import LossTerms, Rows
from dist_sae.dictionaries.recipes.jumprelu import JumpReLU, jump, jump_relu
from dist_sae.dictionaries.recipes.relu import ReLU
from dist_sae.dictionaries.recipes.topk import TopK
from dist_sae.kernels import select
from dist_sae.kernels.torch import KERNELS
from tests.dictionaries.ranks import on_ranks
from tests.dictionaries.recipes import (
    AUXK,
    BATCH,
    CONFIGS,
    D_IN,
    KINDS,
    N_LATENTS,
    PENALISED,
    PROGRESS,
    UNIT_ROWS,
    VARIANCE,
    VARIANTS,
    K,
    along_rows,
    check_against_oracle,
    gradients,
    make,
    relative_error,
    rows,
    sae_rows,
    some_dead,
    step,
)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("dead", ["none", "some", "all"])
@pytest.mark.parametrize("kind", VARIANTS)
def test_loss_and_gradients_equal_the_dense_reference(
    kind: str, dead: str, dtype: torch.dtype, bound: float
) -> None:
    check_against_oracle(make(VARIANTS[kind], dtype), dead, bound)


@pytest.mark.parametrize("sparse_below", [0.0, 1.0])
@pytest.mark.parametrize("kind", [*PENALISED, "clt_jumprelu"])
def test_the_sparse_and_the_dense_way_give_the_same(
    kind: str, sparse_below: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(penalised, "SPARSE_BELOW", sparse_below)
    monkeypatch.setattr(penalised, "CHUNK_BYTES", 4 * BATCH * 24)  # chunks of 24, 24 and 16 latents
    check_against_oracle(make(CONFIGS[kind]), "none", 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_latents_do_not_change_what_is_selected(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, x = make(CONFIGS[kind]), rows()
    whole = sae.objective(sae_rows(x), step(some_dead()))
    monkeypatch.setattr(select, "CHUNK_LATENTS", 16)
    monkeypatch.setattr(select, "CHUNK_BYTES", 8 * 16 * 10)  # blocks of 10 rows
    chunked = sae.objective(sae_rows(x), step(some_dead()))
    assert torch.equal(whole.fired, chunked.fired)
    assert int(whole.active) == int(chunked.active)
    assert relative_error(chunked.terms.total, whole.terms.total) <= 1e-12


@pytest.mark.parametrize("sparse_below", [0.0, 1.0])
@pytest.mark.parametrize("kind", [*KINDS, "routed by batch"])
def test_inference_in_bounded_memory_decodes_what_it_encodes(
    kind: str, sparse_below: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "SPARSE_BELOW", sparse_below)
    monkeypatch.setattr(select, "CHUNK_LATENTS", 16)
    monkeypatch.setattr(select, "CHUNK_BYTES", 8 * 16 * 10)  # blocks of 10 rows
    config = CONFIGS.get(kind, CONFIGS["routed"].model_copy(update={"selection": "batch"}))
    sae, x = make(config), rows()
    sae.objective(sae_rows(x), step())  # sets the threshold of batch selections
    codes, found = sae.encode(x), sae.infer(x)
    torch.testing.assert_close(found.x_hat, sae.decode(codes, x), rtol=1e-12, atol=1e-12)
    counts = torch.bincount(codes.latents[codes.acts > 0], minlength=N_LATENTS)
    assert torch.equal(found.firings.long(), counts)


def test_auxk_gives_the_encoder_a_gradient() -> None:
    """AuxK trains dead latents' encoder rows.

    In one other implementation AuxK gives the encoder no gradient, so it revives nothing.
    """
    sae, dead = make(CONFIGS["topk"]), some_dead()
    found = gradients(sae, sae.objective(sae_rows(rows()), step(dead)).terms.auxk)
    assert found["W_enc"][dead].norm() > 0
    assert found["b_enc"][dead].norm() > 0
    assert found["W_enc"][~dead].norm() == 0


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka"])
def test_a_stuck_latent_is_tied_again(kind: str) -> None:
    """Re-tying revives a latent that is negative on every row, which AuxK cannot reach."""
    sae, dead = make(CONFIGS[kind]), torch.zeros(N_LATENTS, dtype=torch.bool)
    dead[9] = True
    with torch.no_grad():
        sae.b_enc[9] = -50.0
    found = gradients(sae, sae.objective(sae_rows(rows()), step(dead)).terms.auxk)
    assert found["b_enc"][9] == 0
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    x, error = rows(), rows() / 3
    sae.revive(dead, x, error)
    assert sae.b_enc[9] == 0
    direction = before["W_dec"][9]
    e_hat = ((x - before["b_dec"]) @ direction).relu()[:, None] * direction
    length = (error * e_hat).sum() / e_hat.square().sum()
    torch.testing.assert_close(sae.W_enc[9].detach(), length * direction)
    for name, parameter in sae.named_parameters():
        unchanged = ~dead if name in ("W_enc", "b_enc") else slice(None)
        assert torch.equal(parameter[unchanged], before[name][unchanged]), name
    assert gradients(sae, sae.objective(sae_rows(rows()), step(dead)).terms.auxk)["b_enc"][9] != 0


def test_stuck_latents_that_are_alike_do_not_overshoot() -> None:
    """Reviving several equal latents at once does not overshoot.

    Four copies with unit encoders would reconstruct four times a row's component along them.
    """
    sae, stuck = make(CONFIGS["topk"]), torch.arange(N_LATENTS) < AUXK
    x = rows()
    error = (x - sae.b_dec).detach()
    with torch.no_grad():
        sae.W_dec[stuck] = x[0] / x[0].norm()
    sae.revive(stuck, x, error)
    e_hat = (error @ sae.W_enc[stuck].T).relu() @ sae.W_dec[stuck]
    assert (error - e_hat).square().sum() < error.square().sum()
    # these latents cannot reduce this error, so they keep a small length
    sae.revive(stuck, x, -error)
    lengths = sae.W_enc[stuck].detach().norm(dim=1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.01))
    assert gradients(sae, sae.objective(sae_rows(x), step(stuck)).terms.auxk)["W_enc"][stuck].any()


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka"])
def test_a_stuck_latent_that_hardly_meets_a_row_gets_no_long_encoder(kind: str) -> None:
    """A latent nearly orthogonal to its only row gets an encoder of length 1.

    Their cosine is .001, and the best length would be 1,000.
    """
    sae, stuck = make(CONFIGS[kind]), torch.arange(N_LATENTS) == 9
    x = rows()[:1]
    centred = (x - sae.b_dec).detach()
    beside = torch.zeros_like(centred)
    beside[0, 0], beside[0, 1] = -centred[0, 1], centred[0, 0]
    with torch.no_grad():
        sae.W_dec[9] = normalize(normalize(centred) / 1000 + normalize(beside))[0]
    sae.revive(stuck, x, beside)
    assert float(sae.W_enc[9].detach().norm()) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka"])
def test_latents_selected_at_zero_get_no_gradient(kind: str) -> None:
    sae = make(CONFIGS[kind].model_copy(update={"auxk": 0}))
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)  # nothing is positive, so all k selected latents are at zero
        sae.b_enc[3] = 100.0  # except this one
    output = sae.objective(sae_rows(rows()), step())
    assert int(output.active) == BATCH
    assert output.fired.nonzero()[:, 0].tolist() == [3]
    found = gradients(sae, output.terms.total)
    for name in ("W_enc", "b_enc", "W_dec"):
        others = torch.arange(N_LATENTS) != 3
        assert torch.equal(found[name][others], torch.zeros_like(found[name][others])), name
        assert found[name][3].norm() > 0


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka"])
def test_auxk_does_not_count_the_bias_twice(kind: str) -> None:
    """Shifting the data and b_dec by the same amount changes neither the error nor AuxK."""
    sae, x, now = make(CONFIGS[kind]), rows(), step(some_dead())
    before = sae.objective(sae_rows(x), now).terms.auxk
    with torch.no_grad():
        sae.b_dec.add_(3.0)
    after = sae.objective(sae_rows(x + 3.0), now).terms.auxk
    torch.testing.assert_close(before, after, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka", "routed"])
def test_auxk_makes_no_gradient_of_its_own(kind: str) -> None:
    """AuxK adds to the main loss's gradients in place.

    A separate gradient would be as large as the weight, and autograd would need a third to add the
    two.
    """
    sae, x, places = make(CONFIGS[kind]), rows(), []

    def sum_by_latent(*arguments: Any, **named: Any) -> Tensor:
        sums = KERNELS.sum_by_latent(*arguments, **named)
        places.append(sums.data_ptr())
        return sums

    sae.kernels = KERNELS._replace(sum_by_latent=sum_by_latent)
    terms = sae.objective(sae_rows(x), step(some_dead())).terms
    terms.total.backward()  # type: ignore[no-untyped-call]
    assert terms.auxk > 0
    assert sae.W_enc.grad is not None
    assert sae.W_dec.grad is not None
    assert places == [sae.W_dec.grad.data_ptr(), sae.W_enc.grad.data_ptr()]


def test_auxk_is_zero_when_nothing_is_left_to_explain() -> None:
    sae = make(CONFIGS["topk"])
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.b_dec.fill_(2.0)
    terms = sae.objective(
        sae_rows(torch.full((BATCH, D_IN), 2.0).double()), step(some_dead())
    ).terms
    assert terms.auxk == 0
    assert terms.fvu == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka", "routed"])
def test_auxk_is_zero_when_all_rows_are_alike(kind: str, dtype: torch.dtype) -> None:
    """AuxK is 0 if all rows are equal, also on four ranks.

    Then all errors are equal up to rounding, and AuxK must not divide by their variance.
    """
    x = rows(dtype)[:1].expand(BATCH, D_IN).contiguous()

    def losses(axis: LatentAxis = WHOLE) -> LossTerms:
        sae = make(CONFIGS[kind], dtype, axis)
        first = axis.replica * axis.shards + axis.shard
        own = x.chunk(axis.replicas * axis.shards)[first]
        dead = some_dead().chunk(axis.shards)[axis.shard]
        return sae.objective(
            sae_rows(own), step(dead)._replace(n_dead=int(some_dead().sum()))
        ).terms

    whole, ranks = losses(), on_ranks(2, 2, losses)
    assert whole.auxk == 0
    assert whole.fvu > 0
    assert all(terms.auxk == 0 for terms in ranks)


def test_fvu_by_hand() -> None:
    """FVU matches a calculation by hand with two latents along the axes and k = 1.

    x = (3, 1) keeps 3 and loses 1. x = (0, 2) is kept whole.
    """
    sae = TopK(TopKConfig(n_latents=2, k=1, auxk=0), 2, dtype=torch.float64)
    sae.product_dtype = torch.float64
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.eye(2))
    x = torch.tensor([[3.0, 1.0], [0.0, 2.0]]).double()
    now = step(torch.zeros(2, dtype=torch.bool))._replace(variance=4.0)
    # squared errors 1 and 0; divided by 2 rows x variance 4
    assert sae.objective(sae_rows(x), now).terms.fvu.item() == pytest.approx(1 / 8)
    codes = sae.encode(x)
    assert codes.latents.tolist() == [0, 1]
    assert codes.acts.tolist() == [3.0, 2.0]


def test_a_gradient_along_a_unit_row_is_left_out() -> None:
    for kind in UNIT_ROWS:
        sae = make(CONFIGS[kind])
        found = gradients(sae, sae.objective(sae_rows(rows()), step(some_dead())).terms.total)[
            "W_dec"
        ]
        assert float(along_rows(found, sae.W_dec.detach()).norm()) <= 1e-12 * float(found.norm())


def test_k_anneals_from_its_start() -> None:
    sae = make(CONFIGS["topk"].model_copy(update={"k_start": 25, "k_anneal_share": 0.5}))
    for progress, k in ((0.0, 25), (0.25, 15), (0.5, K), (0.9, K)):
        dead = torch.zeros(N_LATENTS, dtype=torch.bool)
        centred = (rows() - sae.b_dec).detach()
        pre_acts = centred @ sae.W_enc.T + sae.b_enc
        positive = int((pre_acts.topk(k, dim=1).values > 0).sum())
        assert int(sae.objective(sae_rows(rows()), step(dead, progress)).active) == positive


def test_sparsity_penalties_rise_with_the_run() -> None:
    for kind in PENALISED:
        sae = make(CONFIGS[kind].model_copy(update={"sparsity_warmup_share": 0.5}))
        if kind == "jumprelu_tanh":
            sae.config = sae.config.model_copy(update={"pre_act": 0.0})
        at = [
            sae.objective(sae_rows(rows()), step(None, p)).terms.sparsity.item()
            for p in (0.0, 0.25, 0.5, 1.0)
        ]
        assert at[0] == 0
        assert at[1] == pytest.approx(at[2] / 2)
        assert at[3] == at[2] > 0


def test_the_l0_gradient_counts_the_entries_in_the_window() -> None:
    """The pseudo-derivative of L0 is -count / eps, not half of that (B10.3).

    It is checked on a grid of values around the threshold.
    """
    eps, theta = 0.5, torch.full((1,), 1.0, dtype=torch.float64, requires_grad=True)
    z = torch.linspace(0, 2, 20_001, dtype=torch.float64)[:, None]
    jump(z, theta, eps).sum().backward()  # type: ignore[no-untyped-call]
    count = int(((z - 1).abs() < eps / 2).sum())
    assert theta.grad is not None
    assert float(theta.grad) == pytest.approx(-count / eps, rel=2e-3)
    theta.grad.zero_()
    jump_relu(z, theta, eps).sum().backward()  # type: ignore[no-untyped-call]
    assert theta.grad is not None
    assert float(theta.grad) == pytest.approx(-1.0 * count / eps, rel=2e-3)


def test_l1_shrinks_a_single_feature_by_half_of_lambda() -> None:
    """L1 shrinks a code by lambda / 2.

    With one unit-norm latent and x = a, (a - f)^2 + lambda f is least at f = a - lambda / 2.
    """
    sae = ReLU(ReLUConfig(n_latents=1, sparsity=0.6, sparsity_warmup_share=0), 1)
    sae.product_dtype = torch.float32
    with torch.no_grad():
        sae.W_enc.fill_(1.0)
        sae.W_dec.fill_(1.0)
    x, now = torch.full((8, 1), 2.0), step(torch.zeros(1, dtype=torch.bool))
    optimizer = torch.optim.SGD([sae.b_enc], lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        (sae.objective(sae_rows(x), now).terms.total * VARIANCE).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert float(sae.encode(x).acts[0]) == pytest.approx(2.0 - 0.6 / 2, abs=1e-3)


def test_jumprelu_and_topk_do_not_shrink() -> None:
    """JumpReLU's penalty does not depend on the activation, so it does not shrink codes."""
    sae = JumpReLU(JumpReLUConfig(n_latents=1, sparsity=0.1, sparsity_warmup_share=0), 1)
    with torch.no_grad():
        sae.W_enc.fill_(1.0)
        sae.W_dec.fill_(1.0)
        sae.theta.fill_(0.1)
    found = gradients(
        sae,
        sae.objective(sae_rows(torch.full((8, 1), 2.0)), step(torch.zeros(1).bool())).terms.total,
    )
    assert float(found["b_enc"]) == pytest.approx(0, abs=1e-7)


def test_bf16_products_select_nearly_the_same() -> None:
    """bf16 products change the FVU by less than 1 %.

    bf16 has 8 bits, so values agree to .4 %, and the reconstruction to about the same.
    """
    for kind in KINDS:
        sae, x = make(CONFIGS[kind], torch.float32), rows(torch.float32)
        exact = sae.objective(sae_rows(x), step(some_dead())).terms.fvu
        sae.product_dtype = torch.bfloat16
        rough = sae.objective(sae_rows(x), step(some_dead())).terms.fvu
        assert rough.item() == pytest.approx(exact.item(), rel=0.01), kind


@pytest.mark.parametrize("sparse_below", [0.0, 1.0])
@pytest.mark.parametrize("kind", PENALISED)
def test_bf16_products_are_the_encoders_alone(
    kind: str, sparse_below: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the encoder's products are in bf16.

    Values and the decoder's gradient are computed in fp32 from the rounded pre-activations.
    """
    monkeypatch.setattr(penalised, "SPARSE_BELOW", sparse_below)
    sae, x = make(CONFIGS[kind], torch.float32), rows(torch.float32)
    assert isinstance(sae, penalised.Penalised)
    sae.product_dtype = torch.bfloat16
    output = sae.objective(sae_rows(x), step())
    with torch.no_grad():
        pre_acts = (x.bfloat16() @ sae.W_enc.bfloat16().T).float() + sae.b_enc
        acts = sae.codes_of(pre_acts.clone(), torch.arange(N_LATENTS))
        acts = acts * (pre_acts > sae.thresholds)
        error = x - acts @ sae.W_dec - sae.b_dec
        gradient = -2 * acts.T @ error / (len(x) * VARIANCE)
        if kind in UNIT_ROWS:
            gradient -= along_rows(gradient, sae.W_dec)
    torch.testing.assert_close(output.error, error, rtol=1e-5, atol=1e-5)
    found = gradients(sae, output.terms.fvu)["W_dec"]
    assert relative_error(found, gradient) <= 1e-5


def test_batchtopk_at_inference_is_a_threshold_that_keeps_k_on_average() -> None:
    sae, x = make(CONFIGS["batchtopk"], torch.float32), rows(torch.float32, 512)
    # before the first step everything positive is active
    assert len(sae.encode(x).acts) > K * len(x)
    for _ in range(3):
        sae.objective(sae_rows(x), step())
    codes = sae.encode(x)
    assert len(codes.acts) == pytest.approx(K * len(x), rel=0.01)
    assert float(codes.acts.min()) > 0
    sae.eval()
    before = sae.get_buffer("threshold").clone()
    sae.objective(sae_rows(rows(torch.float32)), step())
    assert torch.equal(before, sae.get_buffer("threshold"))


def test_the_recipe_with_more_dead_than_auxk_uses_auxk_of_them() -> None:
    sae = make(CONFIGS["topk"])
    dead = some_dead()
    assert int(dead.sum()) > AUXK
    found = gradients(sae, sae.objective(sae_rows(rows()), step(dead)).terms.auxk)
    assert 0 < int((found["b_enc"] != 0).sum()) <= int(dead.sum())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_and_what_is_reconstructed_may_differ(kind: str) -> None:
    """Codes depend on the inputs; the error, the loss and b_dec depend on the targets."""
    x, targets = rows(), rows().flip(0) + 2.0
    sae, now = make(CONFIGS[kind]), step()
    x_hat = x - sae.objective(sae_rows(x), now).error
    output = sae.objective(Rows(x, targets), now)
    torch.testing.assert_close(output.error, targets - x_hat)
    fvu = (targets - x_hat).square().sum() / (BATCH * VARIANCE)
    torch.testing.assert_close(output.terms.fvu.detach(), fvu)
    torch.testing.assert_close(sae.measure(Rows(x, targets), PROGRESS), output.error)
    sae.initialise(Rows(x, targets), seed=0)
    torch.testing.assert_close(sae.b_dec.detach(), geometric_median(targets, WHOLE))


def test_a_tensor_says_how_it_is_sharded() -> None:
    sae = make(CONFIGS["topk"], axis=LatentAxis(shard=1, shards=2))
    undeclared = "is declared neither per latent nor replicated"
    with pytest.raises(ValueError, match=undeclared):
        sae.register_buffer("counts", torch.zeros(3))
    with pytest.raises(ValueError, match=undeclared):
        sae.scale = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="does not have 32 latents in dim 0"):
        sae.add_tensor("counts", torch.zeros(N_LATENTS), per_latent=True)
    sae.add_tensor("counts", torch.zeros(N_LATENTS // 2), per_latent=True)
    layout = {name: sae.is_per_latent(name) for name, _ in sae.tensors()}
    per_latent = dict.fromkeys(("W_enc", "W_dec", "b_enc", "counts"), True)
    assert layout == per_latent | {"b_dec": False}
    assert [len(tensor) for tensor in sae.replicated] == [D_IN]
