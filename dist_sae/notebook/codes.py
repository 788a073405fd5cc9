"""Sparse codes: the active entries of the codes of a batch of rows."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dist_sae.dictionaries.interface import Codes
from dist_sae.kernels import Entries


class SparseCodes(NamedTuple):
    """The active entries of codes `[*rows, n_latents]`, sorted by row and then by latent."""

    acts: Float[Tensor, " entries"]
    """Activations, above 0."""
    latents: Int[Tensor, " entries"]
    rows: Int[Tensor, " entries"]
    """Row index of each entry, with all leading dimensions flattened."""
    shape: tuple[int, ...]
    """Shape of the dense codes, `(*rows, n_latents)`."""

    @property
    def counts(self) -> Int[Tensor, " rows"]:
        """Number of active latents of each row."""
        return torch.bincount(self.rows, minlength=math.prod(self.shape[:-1]))

    def dense(self) -> Float[Tensor, "*rows n_latents"]:
        """Return the dense codes, with zeros. They take rows x n_latents numbers."""
        codes = self.acts.new_zeros(math.prod(self.shape[:-1]), self.shape[-1])
        return codes.index_put((self.rows, self.latents), self.acts).view(self.shape)

    def csr(self) -> Tensor:
        """Return the codes as a `torch.sparse_csr` tensor `[rows, n_latents]`."""
        counts = self.counts
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        size = (len(counts), self.shape[-1])
        return torch.sparse_csr_tensor(starts, self.latents, self.acts, size)

    @classmethod
    def of(cls, codes: Codes, shape: tuple[int, ...]) -> "SparseCodes":
        """Select the active entries of a dictionary's codes.

        Args:
            codes: Codes from `Dictionary.encode`.
            shape: Shape of the dense codes.
        """
        rows = Entries(codes.latents, codes.starts, shape[-1]).rows
        on = codes.acts > 0
        acts, latents, rows = codes.acts[on], codes.latents[on].long(), rows[on]
        order = (rows * shape[-1] + latents).argsort()
        return cls(acts[order], latents[order], rows[order], shape)
