"""Which latents are dead, counted in rows of the global batch."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dist_sae.sae.base import Codes


def fired(codes: Codes, n_latents: int) -> Bool[Tensor, " n_latents"]:
    """Latents that are active in at least one row."""
    hit = torch.zeros(n_latents, dtype=torch.bool, device=codes.latents.device)
    hit[codes.latents[codes.acts > 0]] = True
    return hit


class DeadLatents:
    """Rows since each latent last fired.

    Args:
        n_latents: Width of the dictionary.
        after_rows: A latent is dead when it has not fired for so many rows.
        device: Where the codes will be.
    """

    idle_rows: Int[Tensor, " n_latents"]

    def __init__(self, n_latents: int, after_rows: int, device: torch.device | str = "cpu") -> None:
        self.idle_rows = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self._after_rows = after_rows

    @property
    def mask(self) -> Bool[Tensor, " n_latents"]:
        """True at dead latents."""
        return self.idle_rows >= self._after_rows

    def update(self, hit: Bool[Tensor, " n_latents"], rows: int) -> None:
        """Take in a global batch of `rows` rows in which the latents of `hit` fired."""
        self.idle_rows = torch.where(hit, 0, self.idle_rows + rows)
