"""Sums by latent in C++ and the memory that they reuse. test_select.py tests the selection."""

from functools import partial

import pytest
import torch
from torch import Tensor

from dist_sae.kernels import Entries, Kernels, autograd, native
from dist_sae.kernels.torch import KERNELS
from tests.dictionaries import products
from tests.dictionaries.products import N_LATENTS, PATTERNS, assert_close_to_oracle, compute

make_case = partial(products.make_case, device=torch.device("cpu"))
SUMS = ["sum_by_latent", "sum_by_latent less along"]


@pytest.fixture
def kernels() -> Kernels:
    if reason := native.available():
        pytest.skip(reason)
    return native.kernels()


@pytest.mark.parametrize("product", SUMS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("d_in", [20, 530])
def test_sums_equal_the_dense_ones(kernels: Kernels, product: str, pattern: str, d_in: int) -> None:
    """C++ sums match dense ones twice in a row, so reused memory does not leak into the second."""
    case = make_case(pattern, d_in)
    for _ in range(2):
        assert_close_to_oracle(compute(kernels, product, case), product, case)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sums_of_values_are_those_of_fp64_whichever_way(kernels: Kernels, pattern: str) -> None:
    """Torch and C++ add values in the order of the entries, so their sums have the same bits."""
    case = make_case(pattern, 20)
    expected = [0.0] * N_LATENTS
    for latent, value in zip(
        case.entries.latents.tolist(), case.coefficients.tolist(), strict=True
    ):
        expected[latent] += value
    for which in (kernels, KERNELS):
        sums = which.sum_values(case.coefficients, case.entries)
        assert torch.equal(sums, torch.tensor(expected))


@pytest.mark.parametrize("name", ["torch", "native"])
def test_gradients_of_a_latent_that_is_always_on_keep_their_digits(
    kernels: Kernels, name: str
) -> None:
    """Gradients of a latent that fires on all 131,072 rows keep fp32 precision.

    Naive sequential summation would lose three digits or more.
    """
    kernels = kernels if name == "native" else KERNELS
    n, d_in = 131_072, 2
    generator = torch.Generator().manual_seed(0)
    rows, acts = torch.rand(n, d_in, generator=generator), torch.rand(n, generator=generator)
    entries = Entries(torch.zeros(n, dtype=torch.int64), torch.arange(n), 3)
    weights = [torch.eye(3, d_in, requires_grad=True) for _ in range(2)]
    bias = torch.zeros(3, requires_grad=True)
    pre_acts = autograd.encode(acts, kernels, entries, rows, weights[0], bias)
    x_hat = autograd.decode(pre_acts, kernels, entries, weights[1], unit_rows=False)
    x_hat.backward(rows)  # type: ignore[no-untyped-call]
    by_hand = rows.double()[:, 0]  # gradient of each code: the row along the decoder row
    expected = [by_hand @ rows.double(), acts.double() @ rows.double(), by_hand.sum()[None]]
    for tensor, sums in zip([*weights, bias], expected, strict=True):
        assert tensor.grad is not None
        torch.testing.assert_close(tensor.grad[0].double().view(-1), sums, rtol=1e-6, atol=0)


def test_tensors_need_not_be_contiguous(kernels: Kernels) -> None:
    case = make_case("ragged", 20)
    case = case._replace(
        # an expanded tensor, as in the gradient of a sum
        coefficients=torch.ones(1).expand(len(case.coefficients)),
        rows=case.rows.T.contiguous().T,
        W=case.W.T.contiguous().T,
        along=case.along.repeat_interleave(2)[::2],
    )
    for product in SUMS:
        assert_close_to_oracle(compute(kernels, product, case), product, case)


def test_gradients_lie_where_those_of_the_step_before_were(kernels: Kernels) -> None:
    case, places, others = make_case("ragged", 20), set(), []
    encoder, decoder = (case.W.clone().requires_grad_() for _ in range(2))
    bias = case.W[:, 0].clone().requires_grad_()
    for _ in range(3):
        acts = autograd.encode(case.coefficients, kernels, case.entries, case.rows, encoder, bias)
        autograd.decode(acts, kernels, case.entries, decoder, unit_rows=True).sum().backward()  # type: ignore[no-untyped-call]
        for weight in (encoder, decoder):
            assert weight.grad is not None
            places.add(weight.grad.data_ptr())
            weight.grad = None  # as optimizers do
            others += [torch.empty_like(weight) for _ in range(20)]  # occupy the free memory
    assert len(places) == 2


def test_memory_that_something_still_has_is_left_alone(kernels: Kernels) -> None:
    """The memory of a gradient, or of a view of one, is not reused while something refers to it."""
    case = make_case("ragged", 20)
    first = compute(kernels, "sum_by_latent", case)
    row, expected = first[3].detach(), first[3].clone()
    del first
    other = case._replace(coefficients=-case.coefficients)
    held = [compute(kernels, "sum_by_latent", other) for _ in range(4)]
    assert torch.equal(row, expected)
    assert len({sums.data_ptr() for sums in held}) == 4
    for sums in held:
        assert_close_to_oracle(sums, "sum_by_latent", other)


def test_no_more_is_kept_than_two_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = native.GradientMemory()
    held = [memory.empty(N_LATENTS, width) for width in (20, 30, 40, 50)]
    places = [tensor.data_ptr() for tensor in held]
    held.clear()
    made, empty = list[tuple[int, ...]](), torch.empty

    def make(*shape: int) -> Tensor:
        made.append(shape)
        return empty(*shape)

    monkeypatch.setattr(torch, "empty", make)
    again = [memory.empty(N_LATENTS, width).data_ptr() for width in (50, 40)]
    assert again == places[:1:-1]
    for width in (30, 20):
        memory.empty(N_LATENTS, width)
    assert made == [(N_LATENTS, 30), (N_LATENTS, 20)]
