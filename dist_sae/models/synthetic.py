"""Synthetic activations from a known dictionary, for demos, tests and the recovery benchmark."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dist_sae.config.data import SYNTHETIC_SITE, SyntheticModel

_BLOCK_ROWS = 64  # rows drawn together; changing this changes all rows


class SyntheticTokenizer:
    """Tokenizer of synthetic documents. Text "17" is document 17; its tokens are row numbers."""

    bos = None
    special: frozenset[int] = frozenset()

    def __init__(self, document_rows: int) -> None:
        self._rows = document_rows

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(range(int(t) * self._rows, (int(t) + 1) * self._rows)) for t in texts]

    def text(self, tokens: Sequence[int]) -> list[str]:
        return [f"{token} " for token in tokens]


class SyntheticSource:
    """Source of rows x = sum_i a_i D_i + b. `SyntheticModel` describes the distribution.

    Row r is a pure function of (seed, r), however rows are grouped into contexts and batches,
    because rows are drawn in fixed blocks, each with its own generator. The dictionary's seed
    differs from all seeds of trainers, so no trained dictionary starts near the true one.

    Attributes:
        directions: The dictionary D, `[n_features, d_in]`, unit rows.
        probabilities: Probability that each feature is active, `[n_features]`.
        bias: b, `[d_in]`.
    """

    directions: Float[Tensor, "n_features d_in"]
    probabilities: Float[Tensor, " n_features"]
    bias: Float[Tensor, " d_in"]

    def __init__(self, config: SyntheticModel) -> None:
        self._config = config
        generator = torch.Generator().manual_seed(_mix(config.seed, -1))
        directions = torch.randn(config.n_features, config.d_in, generator=generator)
        self.directions = directions / directions.norm(dim=1, keepdim=True)
        self.bias = 0.5 * torch.randn(config.d_in, generator=generator) / config.d_in**0.5
        self.probabilities = _zipf(config)

    def run(
        self, tokens: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
    ) -> dict[str, Float[Tensor, "batch seq d_in"]]:
        acts = torch.zeros(*tokens.shape, self._config.d_in)
        for i, (row, real) in enumerate(zip(tokens, mask, strict=True)):
            n = int(real.sum())
            acts[i, :n] = self._rows(int(row[0]), n, lambda a: a @ self.directions + self.bias)
        return {SYNTHETIC_SITE: acts}

    def intensities(self, first_row: int, n: int) -> Float[Tensor, "n n_features"]:
        """Return the true a_i of rows `[first_row, first_row + n)`."""
        return self._rows(first_row, n, lambda a: a)

    def _rows(self, first: int, n: int, of: Callable[[Tensor], Tensor]) -> Tensor:
        # `of` is applied to whole blocks, because a product's last bits depend on its shape
        blocks = range(first // _BLOCK_ROWS, (first + n - 1) // _BLOCK_ROWS + 1)
        return torch.cat([of(self._block(b)) for b in blocks])[first % _BLOCK_ROWS :][:n]

    def _block(self, number: int) -> Float[Tensor, "rows n_features"]:
        generator = torch.Generator().manual_seed(_mix(self._config.seed, number))
        shape = (_BLOCK_ROWS, self._config.n_features)
        active = torch.rand(shape, generator=generator) < self.probabilities
        intensity = (1 + 0.25 * torch.randn(shape, generator=generator)).clamp_min(0.1)
        return intensity * active


def _zipf(config: SyntheticModel) -> Tensor:
    """Return p_i ~ i^-zipf, at most p_max, with sum l0. The excess above p_max goes to the rest."""
    p = torch.arange(1, config.n_features + 1, dtype=torch.float64) ** -config.zipf
    capped = torch.zeros_like(p, dtype=torch.bool)
    while True:
        free = config.l0 - config.p_max * int(capped.sum())
        p = torch.where(capped, config.p_max, p * free / p[~capped].sum())
        over = (p > config.p_max) & ~capped
        if not over.any():
            return p.float()
        capped |= over


def _mix(seed: int, number: int) -> int:
    """Mix two numbers into one 63-bit seed (splitmix64's finalizer)."""
    z = (seed * 0x9E3779B97F4A7C15 + (number + 2) * 0xBF58476D1CE4E5B9 + 0xD1B54A32D192ED03) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return (z ^ (z >> 31)) % 2**63
