"""Stage `products`: this device's sparse products and updates, compared with fp64."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dist_sae.bench.gpu_check.stage import Record, StageContext, comparison, relative_error
from dist_sae.kernels import Adam, Entries, Kernels
from dist_sae.kernels.choice import choose_kernels
from dist_sae.kernels.keys import NO_ENTRY
from dist_sae.kernels.torch import KERNELS as TORCH

_BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 4e-3}  # sums are fp32, then rounded once


class _Shape(NamedTuple):
    rows: int
    n_latents: int
    d_in: int
    """770 tests a width that is not a multiple of a kernel's block."""


def products(context: StageContext) -> Iterator[Record]:
    """Compare products of each pattern, and updates. Selections must be bitwise equal."""
    kernels = choose_kernels("auto", context.device)
    shapes = (
        [_Shape(32, 64, 20)]
        if context.is_dry
        else [_Shape(4096, 65_536, 768), _Shape(999, 8192, 770)]
    )
    for shape in shapes:
        for pattern in ("random", "one latent on every row", "every other row empty", "k = 1"):
            for dtype, bound in _BOUNDS.items():
                errors = _errors(kernels, shape, pattern, dtype, context.device)
                worst = max(errors, key=lambda product: errors[product])
                name = f"{kernels.name}: {pattern}, {shape.d_in} wide, {str(dtype)[6:]}"
                yield comparison(name, errors[worst], bound, worst=worst)
        for k in (1, 32):
            yield _selection(kernels, shape, k, context.device)
        for unit_rows in (False, True):
            yield _update(kernels, shape, context.device, unit_rows=unit_rows)


def _errors(
    kernels: Kernels, shape: _Shape, pattern: str, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    entries = _entries(shape, pattern, generator, device)
    coefficients, rows = normal(len(entries.latents)), normal(shape.rows, shape.d_in)
    W = normal(shape.n_latents, shape.d_in)
    found = {
        "combine": kernels.combine(coefficients, entries, W),
        "gather_dot": kernels.gather_dot(rows, entries, W),
        "sum_by_latent": kernels.sum_by_latent(coefficients, entries, rows),
    }
    at, latents = entries.rows, entries.latents
    weights = coefficients.double()[:, None]
    by_row, by_latent = (rows.new_zeros(n, shape.d_in, dtype=torch.float64) for n in shape[:2])
    expected = {
        "combine": by_row.index_add_(0, at, weights * W.double()[latents]),
        "gather_dot": (rows.double()[at] * W.double()[latents]).sum(1),
        "sum_by_latent": by_latent.index_add_(0, latents, weights * rows.double()[at]),
    }
    return {name: relative_error(found[name], expected[name]) for name in found}


def _entries(
    shape: _Shape, pattern: str, generator: torch.Generator, device: torch.device
) -> Entries:
    """Return latents for each row, ascending, in a pattern that kernels tend to get wrong."""
    k = 1 if pattern == "k = 1" else 16
    width = shape.n_latents // k
    latents = torch.randint(width, (shape.rows, k), generator=generator) + width * torch.arange(k)
    if pattern == "one latent on every row":
        latents[:, 0] = 0
    counts = torch.full((shape.rows,), k)
    if pattern == "every other row empty":
        counts[::2] = 0
        latents = latents[1::2]
    starts = counts.cumsum(0) - counts
    return Entries(latents.flatten().to(device), starts.to(device), shape.n_latents)


def _selection(kernels: Kernels, shape: _Shape, k: int, device: torch.device) -> Record:
    """Compare a selection with many ties. Of equal products, the lower latent must be selected."""
    generator = torch.Generator().manual_seed(k)
    width = min(shape.n_latents, 8192)
    chunks = [
        torch.randint(-40, 40, (shape.rows, width), generator=generator).bfloat16()
        for _ in range(2)
    ]
    bias = torch.randn(width, generator=generator)

    def keep(which: Kernels, where: torch.device) -> Tensor:
        best = torch.full((shape.rows, k), NO_ENTRY, device=where)
        for number, chunk in enumerate(chunks):
            latents = torch.arange(number * width, (number + 1) * width, device=where)
            best = which.keep_largest(best, chunk.to(where), bias.to(where), latents)
        return best.sort(1).values.cpu()

    wrong = int((keep(kernels, device) != keep(TORCH, torch.device("cpu"))).sum())
    return comparison(f"{kernels.name}: {k} largest, with ties", wrong, 0)


def _update(kernels: Kernels, shape: _Shape, device: torch.device, *, unit_rows: bool) -> Record:
    """Compare Adam with the torch kernels in fp64. The bf16 copy must be the rounded weights."""
    size = min(shape.n_latents, 8192), shape.d_in
    given = torch.randn(4, *size, generator=torch.Generator().manual_seed(0))
    given[3].square_()  # exp_avg_sq

    def update(which: Kernels, where: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        tensors = given.to(where, dtype, copy=True)
        W, gradient, exp_avg, exp_avg_sq = tensors
        copy = torch.empty(size, dtype=torch.bfloat16, device=where)
        scale, found_inf = (torch.tensor(n, device=where) for n in (1.5, 0.0))
        adam = Adam(10, 1e-2, 0.9, 0.999, 1e-9, scale, found_inf)
        which.update(W, gradient, exp_avg, exp_avg_sq, adam, unit_rows=unit_rows, copy=copy)
        return tensors[[0, 2, 3]], copy

    found, copy = update(kernels, device, torch.float32)
    expected, _ = update(TORCH, torch.device("cpu"), torch.float64)
    worst = max(relative_error(*pair) for pair in zip(found, expected, strict=True))
    wrong = int((copy != found[0].bfloat16()).sum())
    rows = "unit rows" if unit_rows else "rows of any length"
    return comparison(f"{kernels.name}: Adam, {rows}, {shape.d_in} wide", max(worst, wrong), 1e-6)
