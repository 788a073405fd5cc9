"""The selection in Triton gives the same keys as plain torch, bit for bit.

It runs on the GPU if there is one, else in Triton's interpreter. test_triton_compiles.py runs the
compiler.
"""

import sys

import pytest
import torch
from torch import Tensor

if sys.platform != "linux":
    pytest.skip("Triton requires Linux", allow_module_level=True)

from dist_sae.kernels import triton, triton_select
from dist_sae.kernels.keys import NO_ENTRY, from_keys
from dist_sae.kernels.torch import KERNELS
from tests.dictionaries.products import DEVICE
from tests.dictionaries.test_select import CASES

_ROWS = 2


def check(best: Tensor, products: Tensor, bias: Tensor, latents: Tensor) -> Tensor:
    """Check that Triton selects torch's keys and leaves its inputs alone; return the keys."""
    before = best.clone()
    given = [part.to(DEVICE) for part in (best, products, bias, latents)]
    found = triton.KERNELS.keep_largest(*given).cpu()
    expected = KERNELS.keep_largest(best, products, bias, latents)
    assert found.shape == expected.shape
    assert torch.equal(found.sort(1).values, expected.sort(1).values)
    assert torch.equal(given[0].cpu(), before)
    return found


def nothing(k: int) -> Tensor:
    return torch.full((_ROWS, k), NO_ENTRY)


@pytest.mark.parametrize("case", CASES)
def test_the_largest_over_two_chunks_are_plain_torchs(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The selection over two chunks matches torch.

    The cases have several tiles, the last one partial, and k that is 1, not a power of two, or
    larger than a chunk.
    """
    monkeypatch.setattr(triton_select, "TILE_PRODUCTS", 16)
    for n, k in ((60, 1), (60, 5), (40, 27)):
        pre_acts = CASES[case](n)[:_ROWS]
        best, half = nothing(k), n // 2
        for first in (0, half):
            chunk = pre_acts[:, first : first + half].contiguous()
            best = check(best, chunk, torch.zeros(half), torch.arange(first, first + half))


def test_of_equals_the_lower_latent_is_kept_whichever_comes_first() -> None:
    best = check(nothing(3), torch.ones(_ROWS, 4), torch.zeros(4), torch.arange(4, 8))
    best = check(best, torch.ones(_ROWS, 4), torch.zeros(4), torch.arange(4))
    assert from_keys(best)[1].sort(1).values.tolist() == [[0, 1, 2]] * _ROWS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_biases_are_added_in_fp32(dtype: torch.dtype) -> None:
    """Biases are added in fp32, because bf16 sums would tie where fp32 sums do not."""
    generator = torch.Generator().manual_seed(0)
    products = (1 + torch.rand(_ROWS, 100, generator=generator)).to(dtype)
    bias = torch.rand(100, generator=generator) / 256
    check(nothing(20), products, bias, torch.arange(100))


def test_fewer_products_than_k_leave_the_rest_empty() -> None:
    found = check(nothing(9), torch.ones(_ROWS, 3), torch.zeros(3), torch.arange(3))
    assert (found == NO_ENTRY).sum(1).tolist() == [6, 6]
    check(nothing(2), torch.ones(_ROWS, 0), torch.zeros(0), torch.arange(0))
    assert check(nothing(4)[:0], torch.ones(0, 9), torch.zeros(9), torch.arange(9)).shape == (0, 4)


def test_zeros_infinities_and_what_is_no_number_keep_their_order() -> None:
    inf, nan = torch.inf, torch.nan
    products = torch.tensor([[-0.0, 0.0, inf, -inf, nan, -nan, 1e-45, -1e-45, 0.0, -0.0]] * _ROWS)
    for k in (1, 4, 9):
        check(nothing(k), products, torch.full((10,), -0.0), torch.arange(10))


def test_latents_may_be_any_and_tensors_not_contiguous() -> None:
    generator = torch.Generator().manual_seed(1)
    latents = torch.tensor([3, 2**20, 2**31 + 5, 2**32 - 1]).repeat_interleave(2)[::2]
    products = torch.zeros(4, _ROWS).T
    best = check(torch.full((3, _ROWS), NO_ENTRY).T, products, torch.zeros(8)[::2], latents)
    more = torch.randn(4, _ROWS, generator=generator).T
    check(best.T.contiguous().T, more, torch.zeros(4), torch.arange(4))


def test_what_does_not_fit_a_warp_is_left_to_torch() -> None:
    """Inputs that the kernel cannot handle fall back to torch.

    These are fp64 products, which are rounded to fp32 only after the bias, and k too large for
    registers.
    """
    products = torch.tensor([[1.0, 1.0 + 2**-30, 1.0]] * _ROWS, dtype=torch.float64)
    check(nothing(1), products, torch.zeros(3, dtype=torch.float64), torch.arange(3))
    check(nothing(1100), torch.ones(_ROWS, 3), torch.zeros(3), torch.arange(3))
