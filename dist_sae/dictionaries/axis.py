"""The axis along which latents are sharded, as an interface without torch.distributed.

Recipes use only the methods of `LatentAxis`. This module implements them for a single process;
`distributed/axis.py` implements them with collectives. The ranks form a `replicas` x `shards` grid.
A replica is a whole dictionary, and each of its ranks holds `n_latents / shards` consecutive
latents. Every rank loads its own rows. Within a replica, all rows meet all latents.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(eq=False)
class LatentAxis:
    """This rank's place in the dictionary, and the collectives of its replica.

    In this base class there is a single process, and every collective is the identity.
    """

    shard: int = 0
    """Index of this rank's shard of the latents."""
    shards: int = 1
    """Number of shards of the latents."""
    replica: int = 0
    """Index of this rank's replica."""
    replicas: int = 1
    """Number of replicas that share a batch."""

    def latents(self, n_latents: int) -> range:
        """Return the range of this shard's latents in a dictionary of `n_latents`."""
        n_local = n_latents // self.shards
        return range(self.shard * n_local, (self.shard + 1) * n_local)

    def gather(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "rows d_in"]:
        """Return the rows of all ranks of the replica, in rank order. No gradient."""
        return x

    def scatter_sum(self, parts: Float[Tensor, "rows d_in"]) -> Float[Tensor, "batch d_in"]:
        """Sum over the replica and return this rank's rows. The backward pass is a gather."""
        return parts

    def replicated(self, parameter: Tensor) -> Tensor:
        """Return a replicated parameter, such that its gradient is summed over the replica."""
        return parameter

    def kth_largest(self, keys: Int[Tensor, "rows candidates"], k: int) -> Int[Tensor, " rows"]:
        """Return each row's k-th largest key over all shards of the replica.

        Args:
            keys: Keys, distinct over the replica. The smallest int64 means "no candidate" and may
                repeat.
            k: Rank of the key, counted from 1.
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
        """Exchange rows within the replica (all-to-all). Gradients travel back to the senders.

        Args:
            rows: Rows to send. The first `sent[0]` go to the first shard, and so on.
            sent: Number of rows to each shard.
            received: Number of rows from each shard.
        """
        return rows

    def exchange_counts(self, counts: Int[Tensor, "shards some"]) -> Int[Tensor, "shards some"]:
        """Exchange one row of counts with each shard of the replica (all-to-all)."""
        return counts

    def broadcast_shard(self, tensor: Tensor, shard: int) -> Tensor:  # noqa: ARG002 - there is one
        """Broadcast one shard's tensor within the replica. All shards pass the same shape."""
        return tensor

    def sum_replicas(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks that hold the same shard. No gradient."""
        return tensor

    def sum_replicas_(self, tensor: Tensor) -> None:
        """Sum over the ranks that hold the same shard, in place. No gradient."""

    def gather_replicas(self, tensor: Tensor) -> Tensor:
        """Concatenate the tensors of the ranks that hold the same shard, in replica order.

        All ranks pass the same shape. The result is concatenated along dim 0. No gradient.
        """
        return tensor

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks of all replicas. No gradient."""
        return tensor


WHOLE = LatentAxis()


@dataclass(eq=False)
class PageAxis(LatentAxis):
    """The axis of a page: consecutive latents in a single process (`checkpoint/pages.py`)."""

    page: range = range(0)
    """Range of the page's latents."""

    def latents(self, n_latents: int) -> range:  # noqa: ARG002 - whatever the width
        return self.page
