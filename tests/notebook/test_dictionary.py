"""A dictionary on raw activations gives the results of the trained one on scaled activations."""

import numpy as np
import pytest
import torch

from dist_sae import DistSaeError
from tests.dictionaries.recipes import D_IN, KINDS, N_LATENTS
from tests.notebook.raw import SCALE, of_kind, raw_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_reconstructions_are_those_of_training(kind: str, dtype: torch.dtype) -> None:
    dictionary = of_kind(kind, dtype)
    x = raw_rows(200, D_IN).to(dtype)
    codes, dense = dictionary.encode(x), dictionary.encode(x, dense=True)
    inner = dictionary.sae.encode(x * SCALE)
    assert torch.equal(dictionary(x), dictionary.sae.infer(x * SCALE).x_hat / SCALE)
    assert torch.equal(codes.acts.sort().values, inner.acts[inner.acts > 0].sort().values)
    assert torch.equal(codes.dense(), dense)
    assert ((codes.rows * N_LATENTS + codes.latents).diff() > 0).all()
    assert torch.equal(codes.counts, (dense > 0).sum(1))
    assert 0 < int(codes.counts.sum()) < dense.numel()
    firings = dictionary.sae.infer(x * SCALE).firings
    assert torch.equal((dense > 0).sum(0), firings.long())
    close = 1e-4 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(dictionary.decode(codes, x), dictionary(x), rtol=close, atol=close)
    torch.testing.assert_close(dictionary.decode(dense, x), dictionary(x), rtol=close, atol=close)


@pytest.mark.parametrize(("kind", "centres"), [("topk", True), ("relu", False)])
def test_weights_are_those_of_raw_activations(kind: str, *, centres: bool) -> None:
    """Pre-activations, codes and reconstructions of raw rows match fp64 values computed by hand."""
    dictionary = of_kind(kind)
    x = raw_rows(100, D_IN)
    centred = x - dictionary.b_dec if centres else x
    acts = (centred @ dictionary.W_enc.T + dictionary.b_enc).relu()
    if kind == "topk":
        least = acts.topk(5, dim=1).values[:, -1:]
        acts = acts * (acts >= least)
    torch.testing.assert_close(dictionary.encode(x, dense=True), acts, rtol=1e-9, atol=1e-9)
    x_hat = acts @ dictionary.W_dec + dictionary.b_dec
    torch.testing.assert_close(dictionary(x), x_hat, rtol=1e-9, atol=1e-9)
    assert torch.equal(dictionary.decoder_rows([3, 1]), dictionary.W_dec[[3, 1]])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_may_have_any_shape_and_type(kind: str) -> None:
    dictionary = of_kind(kind)
    x = raw_rows(2, 3, D_IN)
    flat = dictionary.encode(x.flatten(0, 1), dense=True)
    codes = dictionary.encode(x)
    assert codes.shape == (2, 3, N_LATENTS)
    assert torch.equal(codes.dense(), flat.view(2, 3, N_LATENTS))
    assert dictionary(x).shape == dictionary.decode(codes, x).shape == x.shape
    assert dictionary(x[0, 0]).shape == (D_IN,)
    assert torch.equal(dictionary.encode(x.numpy(), dense=True), codes.dense())
    half = x.bfloat16()
    assert torch.equal(dictionary(half), dictionary(half.double()))
    none = dictionary.encode(x[:0])
    assert none.dense().shape == (0, 3, N_LATENTS)
    assert len(none.acts) == 0


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_sparse_codes_make_a_sparse_tensor() -> None:
    """A row without an active latent is an empty row of the sparse tensor."""
    dictionary = of_kind("jumprelu")
    x = torch.cat([raw_rows(5, D_IN), torch.full((2, D_IN), -1e6), raw_rows(3, D_IN, seed=4)])
    with torch.no_grad():
        dictionary.sae.b_enc.copy_(torch.where(dictionary.W_enc.sum(1) < 0, -1e9, 0.0))
    codes = dictionary.encode(x)
    assert (codes.counts == 0).any()
    with torch.sparse.check_sparse_tensor_invariants():  # type: ignore[no-untyped-call]
        assert torch.equal(codes.csr().to_dense(), codes.dense())


@pytest.mark.parametrize("sparse", [True, False])
def test_decoding_is_differentiable_in_the_codes(*, sparse: bool) -> None:
    """The gradient of v . x_hat for a code is v . W_dec[latent]."""
    dictionary = of_kind("topk")
    x, v = raw_rows(7, D_IN), raw_rows(D_IN, seed=9)
    codes = dictionary.encode(x)
    acts = (codes.acts if sparse else codes.dense()).requires_grad_()
    x_hat = dictionary.decode(codes._replace(acts=acts) if sparse else acts)
    (gradient,) = torch.autograd.grad((x_hat @ v).sum(), acts)
    along = dictionary.W_dec @ v
    expected = along[codes.latents] if sparse else along.expand(7, N_LATENTS)
    torch.testing.assert_close(gradient, expected)
    assert not dictionary(x.requires_grad_()).requires_grad


def test_a_skip_asks_for_the_activations() -> None:
    dictionary = of_kind("transcoder")
    with pytest.raises(DistSaeError, match=r"^the dictionary has a linear skip, so decode also"):
        dictionary.decode(dictionary.encode(raw_rows(3, D_IN)))


def test_it_can_be_moved_and_cast() -> None:
    dictionary = of_kind("batchtopk")
    x = raw_rows(50, D_IN)
    before = dictionary(x)
    dictionary.float()
    assert dictionary(x).dtype == dictionary.W_dec.dtype == torch.float32
    torch.testing.assert_close(dictionary(x).double(), before, rtol=1e-3, atol=1e-3)
    assert dictionary.to("meta").W_dec.is_meta


def test_it_says_what_it_is() -> None:
    dictionary = of_kind("topk")
    assert "64 latents, d_in=16, synthetic, step 7" in repr(dictionary)
    assert (dictionary.d_in, dictionary.n_latents) == (D_IN, N_LATENTS)


def test_what_does_not_fit_gets_one_line() -> None:
    dictionary = of_kind("topk")
    x = raw_rows(3, D_IN)
    with pytest.raises(
        DistSaeError, match=r"^activations have width 15, but the dictionary takes 16"
    ):
        dictionary.encode(x[:, 1:])
    with pytest.raises(DistSaeError, match=r"^activations have width 15"):
        dictionary(x[:, 1:])
    with pytest.raises(ValueError, match=r"^activations have width 0"):
        dictionary(np.array(1.0))
    with pytest.raises(DistSaeError, match=r"^codes have width 16, but the dictionary takes 64"):
        dictionary.decode(x)
    codes = dictionary.encode(x)._replace(shape=(3, 63))
    with pytest.raises(DistSaeError, match=r"^codes have width 63"):
        dictionary.decode(codes)
    for latent in (-1, 64):
        with pytest.raises(
            DistSaeError, match=rf"^latent {latent}: the dictionary has latents 0 to 63$"
        ):
            dictionary.decoder_rows([0, latent])
