"""Dead latents, counted in rows of the global batch."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dist_sae.dictionaries.axis import WHOLE, LatentAxis


class DeadLatents:
    """Rows since each latent of this shard last fired.

    Args:
        n_local: Latents of the shard.
        after_rows: Rows without firing after which a latent is dead.
        axis: This rank's place.
        device: Device of the masks.
    """

    idle_rows: Int[Tensor, " n_local"]
    count: int
    """Dead latents of all shards."""
    n_stuck: int
    """Stuck latents of all shards."""

    def __init__(
        self,
        n_local: int,
        after_rows: int,
        axis: LatentAxis = WHOLE,
        device: torch.device | str = "cpu",
    ) -> None:
        self._after_rows = after_rows
        self._axis = axis
        self._last_rows = 0
        self.take(torch.zeros(n_local, dtype=torch.int64, device=device))

    @property
    def mask(self) -> Bool[Tensor, " n_local"]:
        """True at dead latents."""
        return self.idle_rows >= self._after_rows

    @property
    def stuck(self) -> Bool[Tensor, " n_local"]:
        """True for one batch at latents that have been dead for `after_rows` rows more.

        True for one batch again after each further `after_rows` rows.
        """
        since = self.idle_rows - 2 * self._after_rows
        return (since >= 0) & (since % self._after_rows < self._last_rows)

    @property
    def share(self) -> float:
        """Dead latents over all latents of the dictionary."""
        return self.count / (len(self.idle_rows) * self._axis.shards)

    def update(self, fired: Bool[Tensor, " n_local"], rows: int) -> None:
        """Take in a global batch of `rows` rows; `fired` is of this replica's. Collective."""
        hit = self._axis.across_replicas(fired.int()) > 0
        self._last_rows = rows
        self.take(torch.where(hit, 0, self.idle_rows + rows))

    def take(self, idle_rows: Int[Tensor, " n_local"]) -> None:
        """Replace the counts. Collective."""
        self.idle_rows = idle_rows
        counts = self._axis.total(torch.stack([self.mask.sum(), self.stuck.sum()]))
        self.count, self.n_stuck = (counts // self._axis.replicas).tolist()
