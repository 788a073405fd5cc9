"""Updates: Adam, unit rows and the bf16 copy, in all kernels, against fp64."""

import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dist_sae.kernels import Adam, Update, native
from dist_sae.kernels import torch as plain

BETAS, EPS, LR = (0.9, 0.999), 6.25e-10, 1e-2
KERNELS = ["torch", "native", *(["triton"] if sys.platform == "linux" else [])]


class Case(NamedTuple):
    """A tensor and everything else that an update changes."""

    W: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    copy: Tensor


def make_case(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Case:
    generator = torch.Generator().manual_seed(sum(shape))

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    size = 10 ** (6 * torch.rand(shape, generator=generator, dtype=dtype) - 5)
    W, gradient, exp_avg = normal(), size * normal(), size * normal()
    exp_avg_sq = (size * normal()).square()
    for part in (gradient, exp_avg, exp_avg_sq):  # a latent that has never fired
        part[0] = 0
    copy = torch.full(shape, torch.nan, dtype=torch.bfloat16)
    return Case(*(t.to(device) for t in (W, gradient, exp_avg, exp_avg_sq, copy)))


def adam(number: int, device: torch.device, scale: float = 1.0, found_inf: float = 0.0) -> Adam:
    numbers = (torch.tensor(n, device=device) for n in (scale, found_inf))
    return Adam(number, LR, *BETAS, EPS, *numbers)


def clone(case: Case) -> Case:
    return Case(*(part.clone() for part in case))


def take(update: Update, case: Case, step: Adam, *, unit_rows: bool = False) -> Case:
    """Return the updated case with the original gradient, which the update may overwrite."""
    done = clone(case)
    update(*done[:4], step, unit_rows=unit_rows, copy=done.copy)
    return done._replace(gradient=case.gradient)


def oracle(case: Case, number: int, scale: float, *, unit_rows: bool) -> tuple[Tensor, ...]:
    """Return W and its moments after an update by Kingma and Ba's formulas, in fp64."""
    (b1, b2), (W, gradient, m, v, _) = BETAS, (part.double() for part in case)
    gradient = gradient / scale
    m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient.square()
    W = W - LR * m / (1 - b1**number) / ((v / (1 - b2**number)).sqrt() + EPS)
    return W / W.norm(dim=1, keepdim=True) if unit_rows else W, m, v


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> tuple[Update, torch.device]:
    """The update function of each kernel implementation, and a device that it runs on."""
    if request.param == "native":
        if reason := native.available():
            pytest.skip(reason)
        return native.update, torch.device("cpu")
    if request.param == "torch":
        return plain.update, torch.device("cpu")
    from dist_sae.kernels.triton import KERNELS as TRITON
    from tests.dictionaries.products import DEVICE

    return TRITON.update, DEVICE


@pytest.mark.parametrize("scale", [1.0, 7.3])
@pytest.mark.parametrize("number", [1, 1000])
@pytest.mark.parametrize(
    ("shape", "unit_rows"),
    [((1001,), False), ((5, 20), False), ((5, 20), True), ((3, 2048), True), ((2, 530), True)],
)
def test_an_update_is_adams(
    request: pytest.FixtureRequest,
    kernels: tuple[Update, torch.device],
    shape: tuple[int, ...],
    number: int,
    scale: float,
    *,
    unit_rows: bool,
) -> None:
    update, device = kernels
    case = make_case(*shape, device=device)
    found = take(update, case, adam(number, device, scale), unit_rows=unit_rows)
    W, m, v = oracle(case, number, scale, unit_rows=unit_rows)
    # a few roundings of the summed terms
    size = case.exp_avg.abs() + case.gradient.abs()
    assert ((found.exp_avg.double() - m).abs() <= 2**-22 * size).all()
    torch.testing.assert_close(found.exp_avg_sq.double(), v, rtol=2**-21, atol=0)
    torch.testing.assert_close(found.W.double(), W, rtol=2**-21, atol=2**-22)
    rounded = found.W
    if request.node.callspec.params["kernels"] == "triton" and device.type == "cpu":
        # the interpreter truncates instead of rounding
        rounded = (rounded.view(torch.int32) & -(2**16)).view(torch.float32)
    assert torch.equal(found.copy, rounded.to(torch.bfloat16))


def test_without_a_finite_gradient_nothing_changes(kernels: tuple[Update, torch.device]) -> None:
    """A step whose gradient is not finite changes nothing, not even row norms."""
    update, device = kernels
    case = make_case(4, 48, device=device)
    case.copy.copy_(case.W)
    step = adam(3, device, float("nan"), 1.0)
    for before, after in zip(case, take(update, case, step, unit_rows=True), strict=True):
        assert torch.equal(before, after)


def test_rows_of_zeros_stay_so(kernels: tuple[Update, torch.device]) -> None:
    update, device = kernels
    case = make_case(3, 40, device=device)
    case.W[0] = 0  # its gradient and moments are 0 too
    found = take(update, case, adam(1, device), unit_rows=True)
    assert torch.equal(found.W[0], torch.zeros_like(found.W[0]))


def test_rows_wider_than_a_program_and_fp64_are_updated_too(
    kernels: tuple[Update, torch.device],
) -> None:
    update, device = kernels
    for shape, dtype in (((2, 16_400), torch.float32), ((2, 20), torch.float64)):
        case = make_case(*shape, device=device, dtype=dtype)
        found = take(update, case, adam(2, device), unit_rows=True)
        W, *_ = oracle(case, 2, 1.0, unit_rows=True)
        torch.testing.assert_close(found.W.double(), W, rtol=2**-20, atol=2**-22)
        assert found.W.dtype == dtype


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="torch rounds in another order",
)
@pytest.mark.parametrize("shape", [(4096,), (7, 768), (3, 1000)])
def test_updates_in_cpp_have_torchs_bits(shape: tuple[int, ...]) -> None:
    """The C++ update gives torch's bits, so a run can continue with other kernels unchanged."""
    if reason := native.available():
        pytest.skip(reason)
    device = torch.device("cpu")
    one = other = make_case(*shape, device=device)
    for number in range(1, 6):
        step = adam(number, device, scale=1.0 if number % 2 else 1.37)
        one, other = (
            take(update, case, step, unit_rows=len(shape) > 1)
            for update, case in ((plain.update, one), (native.update, other))
        )
        for here, there in zip(one, other, strict=True):
            assert torch.equal(here, there)
