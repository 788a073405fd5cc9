"""The Triton kernels against dense products in fp64 and against plain torch.

They run on the GPU if there is one, else in Triton's interpreter. test_triton_compiles.py runs the
compiler.
"""

import mmap
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

if sys.platform != "linux":
    pytest.skip("Triton requires Linux", allow_module_level=True)

import triton

from dist_sae.kernels import autograd
from dist_sae.kernels import torch as plain
from dist_sae.kernels import triton as kernels
from tests.dictionaries.products import (
    DEVICE,
    N_LATENTS,
    PATTERNS,
    PRODUCTS,
    assert_close_to_oracle,
    compute,
    make_case,
    make_entries,
)


@pytest.fixture(autouse=True)
def dirty_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new memory with NaN, so that elements the kernels do not write are not zero by luck."""

    def new_nan(like: Tensor, size: int | tuple[int, ...], **kwargs: Any) -> Tensor:
        if not like.is_floating_point():
            return like.new_zeros(size, **kwargs)
        return torch.full_like(like.new_zeros(size, **kwargs), torch.nan)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_nan)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("pattern", PATTERNS)
# one width smaller than a block, and one of several blocks, the last of them partial
@pytest.mark.parametrize("d_in", [20, 530])
def test_products_equal_the_dense_ones(product: str, pattern: str, d_in: int) -> None:
    case = make_case(pattern, d_in)
    value = compute(kernels.KERNELS, product, case)
    assert_close_to_oracle(value, product, case)
    # plain torch meets the same bound, so the two differ only by rounding
    assert_close_to_oracle(compute(plain.KERNELS, product, case), product, case)


@pytest.mark.parametrize("product", PRODUCTS)
def test_products_are_summed_in_fp32_when_tensors_are_bf16(product: str) -> None:
    """bf16 products are accumulated in fp32.

    A bf16 sum would be off by far more than the one rounding that the bound allows.
    """
    case = make_case("hot", 200, torch.bfloat16)
    assert_close_to_oracle(compute(kernels.KERNELS, product, case), product, case)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradient_of_latents_that_no_row_selects_is_zero(pattern: str) -> None:
    case = make_case(pattern, 20)
    unselected = torch.ones(N_LATENTS, dtype=torch.bool, device=DEVICE)
    unselected[case.entries.latents] = False
    assert unselected.any()
    for product in ("sum_by_latent", "sum_by_latent less along"):
        gradient = compute(kernels.KERNELS, product, case)
        assert torch.equal(gradient[unselected], torch.zeros_like(gradient[unselected]))


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("pattern", ["one", "ragged"])
def test_rows_that_no_entry_selects_are_not_read(product: str, pattern: str) -> None:
    case = make_case(pattern, 20)
    expected = compute(kernels.KERNELS, product, case)
    for part, chosen in ((case.W, case.entries.latents), (case.rows, case.entries.rows)):
        clean = part[chosen]
        part.fill_(torch.nan)
        part[chosen] = clean
    assert torch.equal(compute(kernels.KERNELS, product, case), expected)


@pytest.mark.parametrize("product", PRODUCTS)
def test_tensors_need_not_be_contiguous(product: str) -> None:
    case = make_case("ragged", 20)
    one = torch.ones(1, device=DEVICE)
    case = case._replace(
        # an expanded tensor, as in the gradient of a sum
        coefficients=one.expand(len(case.coefficients)),
        rows=case.rows.T.contiguous().T,
        W=case.W.T.contiguous().T,
        along=case.along.repeat_interleave(2)[::2],
    )
    assert_close_to_oracle(compute(kernels.KERNELS, product, case), product, case)


def test_coefficients_stay_in_their_row() -> None:
    """A NaN after the end of a row does not reach its sum, which loads entries in fours."""
    case = make_case("ragged", 20)
    clean = kernels.combine(case.coefficients, case.entries, case.W)
    case.coefficients[6:] = torch.nan  # from row 4 on
    x_hat = kernels.combine(case.coefficients, case.entries, case.W)
    assert torch.equal(x_hat[:4], clean[:4])
    assert x_hat[4:6].isnan().all()


@pytest.mark.parametrize("product", ["combine", "sum_by_latent"])
@pytest.mark.parametrize("pattern", ["ragged", "hot"])
@pytest.mark.parametrize("chunk", [3, 5])
def test_long_segments_are_summed_in_chunks(
    product: str, pattern: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Segments longer than a chunk are summed correctly.

    Row 4 of "ragged" has 17 entries, from the 7th on. Latent 7 of "hot" has 18.
    """
    monkeypatch.setattr(kernels, "CHUNK_ENTRIES", chunk)
    case = make_case(pattern, 530)
    assert_close_to_oracle(compute(kernels.KERNELS, product, case), product, case)


@pytest.mark.parametrize("product", ["combine", "sum_by_latent"])
def test_the_tuned_block_changes_no_bit(product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHUNK_ENTRIES", 4)
    case, found = make_case("hot", 300), []
    for columns, warps in ((128, 1), (256, 2), (512, 4)):
        config = triton.Config({"COLUMNS": columns}, num_warps=warps)
        monkeypatch.setattr(kernels.sum_segments_kernel, "configs", [config])
        found.append(compute(kernels.KERNELS, product, case))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_blocks_that_are_tried_fit_the_width() -> None:
    configs = [triton.Config({"COLUMNS": columns}) for columns in (128, 512, 1024, 2048)]
    tried = {
        d_in: [c.kwargs["COLUMNS"] for c in kernels.prune_configs(configs, {"D": d_in})]
        for d_in in (8, 768, 4096)
    }
    assert tried == {8: [128], 768: [128, 512, 1024], 4096: [128, 512, 1024, 2048]}


def test_gradients_equal_those_of_plain_torch() -> None:
    case = make_case("ragged", 20)
    found = []
    for which in (kernels.KERNELS, plain.KERNELS):
        W_enc, W_dec = case.W.clone().requires_grad_(), case.W.flip(0).requires_grad_()
        b_enc = case.W[:, 0].clone().requires_grad_()
        acts = autograd.encode(case.coefficients, which, case.entries, case.rows, W_enc, b_enc)
        x_hat = autograd.decode(acts, which, case.entries, W_dec, unit_rows=True)
        found.append(torch.autograd.grad(acts.sum() + x_hat.sum(), (W_enc, b_enc, W_dec)))
    # sums of at most 40 terms, each about 1: n u sum |terms| is 40 * 2^-24 * 40 = 1e-4
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("product", ["combine", "gather_dot"])
def test_offsets_in_w_may_exceed_an_int32(product: str) -> None:
    """Offsets beyond int32 work: the last row starts at element 2^31.

    The memory is reserved, but almost none of it is touched.
    """
    d_in, n_latents = 2**14, 2**17 + 1
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, 2 * n_latents * d_in, flags=private)
    W = torch.frombuffer(memory, dtype=torch.bfloat16).view(n_latents, d_in)
    W[-1, -2:] = torch.tensor([3.0, 4.0])
    W = W.to(DEVICE)
    entries = make_entries([[n_latents - 1]], n_latents)
    if product == "combine":
        x_hat = kernels.combine(W.new_full((1,), 2.0), entries, W)
        assert x_hat[0, -3:].tolist() == [0.0, 6.0, 8.0]
    else:
        assert kernels.gather_dot(W.new_ones(1, d_in), entries, W).tolist() == [7.0]
