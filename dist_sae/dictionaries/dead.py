"""Tracking of dead latents, in rows of the global batch."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dist_sae.dictionaries.axis import WHOLE, LatentAxis


class DeadLatents:
    """Counter of the rows since each latent of this shard last fired.

    Args:
        n_local: Number of latents in the shard.
        after_rows: Rows without firing after which a latent is dead.
        axis: This rank's place.
        device: Device of the masks.
        layers: Number of input layers. Latent n reads layer n % layers.
    """

    idle_rows: Int[Tensor, " n_local"]

    def __init__(
        self,
        n_local: int,
        after_rows: int,
        axis: LatentAxis = WHOLE,
        device: torch.device | str = "cpu",
        layers: int = 1,
    ) -> None:
        self._after_rows = after_rows
        self._axis = axis
        self._layers = layers
        self._last_rows = 0
        self._known: list[int] = []
        self._unread: Tensor | None = None
        self.set_idle_rows(torch.zeros(n_local, dtype=torch.int64, device=device))

    @property
    def mask(self) -> Bool[Tensor, " n_local"]:
        """Mask of the dead latents."""
        return self.idle_rows >= self._after_rows

    @property
    def stuck(self) -> Bool[Tensor, " n_local"]:
        """Mask of the latents that have been dead for another `after_rows` rows.

        A latent is in the mask for a single batch, and then again for one batch after each further
        `after_rows` rows.
        """
        since = self.idle_rows - 2 * self._after_rows
        return (since >= 0) & (since % self._after_rows < self._last_rows)

    @property
    def count(self) -> int:
        """Number of dead latents over all shards."""
        return self._read()[0]

    @property
    def n_stuck(self) -> int:
        """Number of stuck latents over all shards."""
        return self._read()[1]

    @property
    def counts_by_layer(self) -> list[int]:
        """Numbers of this shard's dead latents, one per input layer."""
        return self._read()[2:]

    @property
    def share(self) -> float:
        """Dead latents as a share of the whole dictionary."""
        return self.count / (len(self.idle_rows) * self._axis.shards)

    def update(
        self, fired: Bool[Tensor, " n_local"], rows: int, extra: int = 0
    ) -> Int[Tensor, " _"]:
        """Count a global batch of `rows` rows. Collective.

        Args:
            fired: Mask of this shard's latents that fired on this replica's rows.
            rows: Rows of the global batch.
            extra: A number to sum over all ranks in the same collective.

        Returns:
            A tensor on the device: the numbers of dead and stuck latents over all shards,
            `counts_by_layer`, and the sum of `extra`. A caller that syncs with the device anyway
            can copy all but the last value and pass them to `counted`, which saves another sync.
        """
        hit = self._axis.sum_replicas(fired.int()) > 0
        self._last_rows = rows
        return self.set_idle_rows(torch.where(hit, 0, self.idle_rows + rows), extra)

    def set_idle_rows(
        self, idle_rows: Int[Tensor, " n_local"], extra: int = 0
    ) -> Int[Tensor, " _"]:
        """Replace the idle-row counts. Collective. For `extra` and the result see `update`."""
        self.idle_rows = idle_rows
        here = self.mask.view(-1, self._layers).sum(0)
        numbers = torch.stack([here.sum(), self.stuck.sum(), here.new_full((), extra)])
        sums = self._axis.total(numbers)
        self._unread = torch.cat([sums[:2] // self._axis.replicas, here])
        return torch.cat([self._unread, sums[2:]])

    def counted(self, numbers: Sequence[float | int]) -> None:
        """Store the numbers from the last `update`, which the caller has copied off the device."""
        self._known, self._unread = [int(number) for number in numbers], None

    def _read(self) -> list[int]:
        if self._unread is not None:
            self.counted(self._unread.tolist())
        return self._known
