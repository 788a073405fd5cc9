"""The axis that latents are sharded over, for code without torch.distributed.

Recipes use only the methods of `LatentAxis`. Here they serve one process; `distributed/axis.py`
implements them with collectives. Ranks form `replicas` x `shards`: a replica is a whole dictionary,
and each of its ranks holds `n_latents / shards` neighbouring latents. Every rank loads its own
rows; within a replica all rows meet all latents.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(eq=False)
class LatentAxis:
    """This rank's place in the dictionary, and the collectives of its replica.

    Here the process is alone, and every collective is the identity.
    """

    shard: int = 0
    """Number of this rank's shard of the latents."""
    shards: int = 1
    """Number of shards of the latents."""
    replica: int = 0
    """Number of this rank's replica."""
    replicas: int = 1
    """Number of replicas that share a batch."""

    def latents(self, n_latents: int) -> range:
        """The latents of this shard, of `n_latents` in the whole dictionary."""
        n_local = n_latents // self.shards
        return range(self.shard * n_local, (self.shard + 1) * n_local)

    def gather(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "rows d_in"]:
        """The rows of all ranks of the replica, in their order; no gradient."""
        return x

    def scatter_sum(self, parts: Float[Tensor, "rows d_in"]) -> Float[Tensor, "batch d_in"]:
        """This rank's own rows of the sum over the replica; its gradient gathers."""
        return parts

    def replicated(self, parameter: Tensor) -> Tensor:
        """A replicated parameter; its gradient is summed over the replica."""
        return parameter

    def kth_largest(self, keys: Int[Tensor, "rows candidates"], k: int) -> Int[Tensor, " rows"]:
        """The k-th largest candidate of the replica for each row.

        Args:
            keys: Distinct over the replica, except the least int64, which means no candidate.
            k: From 1.
        """
        if k >= keys.shape[1]:
            return keys.amin(1)
        return keys.topk(k, dim=1).values[:, -1]

    def exchange(
        self,
        rows: Float[Tensor, "sent d_in"],
        sent: list[int],  # noqa: ARG002 - all stay
        received: list[int],  # noqa: ARG002
    ) -> Float[Tensor, "received d_in"]:
        """All-to-all of rows within the replica; the gradient goes the other way.

        Args:
            rows: The first `sent[0]` are for the first shard, and so on.
            sent: Rows to each shard.
            received: Rows from each shard.
        """
        return rows

    def exchange_counts(self, counts: Int[Tensor, "shards some"]) -> Int[Tensor, "shards some"]:
        """All-to-all of one row of counts with each shard of the replica."""
        return counts

    def of_shard(self, tensor: Tensor, shard: int) -> Tensor:  # noqa: ARG002 - there is one
        """A shard's tensor, on all ranks of the replica; all shards' have the same shape."""
        return tensor

    def across_replicas(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks that hold the same shard; no gradient."""
        return tensor

    def sum_replicas_(self, tensor: Tensor) -> None:
        """Sum over the ranks that hold the same shard, in place; no gradient."""

    def gather_replicas(self, tensor: Tensor) -> Tensor:
        """The tensors of the ranks that hold the same shard, in the order of replicas.

        All have one shape; they are joined along dim 0. No gradient.
        """
        return tensor

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks of all replicas; no gradient."""
        return tensor


WHOLE = LatentAxis()


@dataclass(eq=False)
class PageAxis(LatentAxis):
    """The axis of a page: some consecutive latents, in one process (`checkpoint/pages.py`)."""

    page: range = range(0)
    """Latents of the page."""

    def latents(self, n_latents: int) -> range:  # noqa: ARG002 - whatever the width
        return self.page
