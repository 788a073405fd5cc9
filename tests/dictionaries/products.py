"""Inputs of the sparse products, and the expected results in fp64."""

import os
from typing import NamedTuple

import torch
from torch import Tensor

from dist_sae.kernels import Entries, Kernels

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
N_LATENTS = 19
PATTERNS: dict[str, list[list[int]]] = {
    "none": [[], [], []],
    "one": [[5]],
    "ragged": [[], [3], [0, 18, 3, 9, 3], [], [*range(17)], [3, 1], [], []],
    "hot": [[7] if row % 3 else [2, 7, 12] for row in range(18)],
}
"""Latents of each row. No pattern contains all latents."""
PRODUCTS = ["combine", "gather_dot", "sum_by_latent", "sum_by_latent less along"]


class Case(NamedTuple):
    """Inputs of the three products, on the device."""

    entries: Entries
    coefficients: Tensor
    rows: Tensor
    W: Tensor
    along: Tensor


def make_entries(
    pattern: list[list[int]], n_latents: int = N_LATENTS, device: torch.device = DEVICE
) -> Entries:
    latents = torch.tensor([latent for row in pattern for latent in row], dtype=torch.int64)
    counts = torch.tensor([len(row) for row in pattern])
    return Entries(latents.to(device), (counts.cumsum(0) - counts).to(device), n_latents)


def make_case(
    pattern: str, d_in: int, dtype: torch.dtype = torch.float32, device: torch.device = DEVICE
) -> Case:
    generator = torch.Generator().manual_seed(d_in)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    entries = make_entries(PATTERNS[pattern], device=device)
    selected = torch.zeros(N_LATENTS, dtype=torch.bool, device=device)
    selected[entries.latents] = True
    return Case(
        entries,
        normal(len(entries.latents)),
        normal(len(entries.starts), d_in),
        normal(N_LATENTS, d_in),
        normal(N_LATENTS).where(selected, 0.0),
    )


def compute(which: Kernels, product: str, case: Case) -> Tensor:
    match product:
        case "combine":
            return which.combine(case.coefficients, case.entries, case.W)
        case "gather_dot":
            return which.gather_dot(case.rows, case.entries, case.W)
        case "sum_by_latent":
            return which.sum_by_latent(case.coefficients, case.entries, case.rows)
        case _:
            return which.sum_by_latent(
                case.coefficients, case.entries, case.rows, case.W, case.along
            )


def oracle(product: str, case: Case) -> Tensor:
    """Compute the product in fp64, with a dense matrix."""
    coefficients, rows, W = (part.double() for part in (case.coefficients, case.rows, case.W))
    where = case.entries.rows, case.entries.latents
    codes = W.new_zeros(len(rows), len(W)).index_put_(where, coefficients, accumulate=True)
    match product:
        case "combine":
            return codes @ W
        case "gather_dot":
            return (rows @ W.T)[where]
        case "sum_by_latent":
            return codes.T @ rows
        case _:
            return codes.T @ rows - case.along.double()[:, None] * W


def assert_close_to_oracle(value: Tensor, product: str, case: Case) -> None:
    """Check that each element differs from the oracle only by rounding.

    A sum of n products in fp32, in any order, with one rounding per product, has an error of at
    most n u sum |products|, where u = 2^-24. Adding up partial sums adds a few roundings. Rounding
    the result to its dtype adds a relative error: for bf16 2^-8, or 2^-7 in Triton's interpreter,
    which truncates.
    """
    n = max(len(case.entries.latents), case.W.shape[1]) + 10
    sizes = case._replace(
        coefficients=case.coefficients.abs(),
        rows=case.rows.abs(),
        W=case.W.abs(),
        along=-case.along.abs(),
    )
    expected = oracle(product, case)
    bound = n * 2**-24 * oracle(product, sizes)
    if value.dtype == torch.bfloat16:
        bound = bound + 2**-7 * (expected.abs() + bound)
    assert value.shape == expected.shape
    assert value.dtype == case.W.dtype
    assert ((value.double() - expected).abs() <= bound).all()
