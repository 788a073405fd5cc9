"""How a dictionary is split over ranks, as the mathematics sees it.

The mathematics is written against `LatentAxis`; one process is `WholeAxis`, the identity, and
`distributed/axis.py` has the collectives. Ranks form `replicas` x `shards`: a replica is a whole
dictionary, of which each of its ranks holds `n_latents / shards` neighbouring latents. Every rank
loads rows of its own; within a replica all rows meet all latents.
"""

from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor


@runtime_checkable
class LatentAxis(Protocol):
    """This rank's place in the dictionary, and what its replica does together."""

    @property
    def shard(self) -> int:
        """Which piece of the dictionary this rank holds."""
        ...

    @property
    def shards(self) -> int:
        """Into how many pieces the dictionary is cut."""
        ...

    @property
    def replica(self) -> int:
        """Which whole dictionary this rank belongs to."""
        ...

    @property
    def replicas(self) -> int:
        """How many whole dictionaries share a batch."""
        ...

    def gather(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "rows d_in"]:
        """The rows of all ranks of the replica, in their order; no gradient."""
        ...

    def scatter_sum(self, parts: Float[Tensor, "rows d_in"]) -> Float[Tensor, "batch d_in"]:
        """This rank's own rows of the sum over the replica; its gradient gathers."""
        ...

    def replicated(self, parameter: Tensor) -> Tensor:
        """A parameter that every rank of the replica holds; its gradient is the sum of theirs."""
        ...

    def kth_largest(self, keys: Int[Tensor, "rows candidates"], k: int) -> Int[Tensor, " rows"]:
        """For each row the k-th largest of the replica's candidates.

        Args:
            keys: Distinct over the replica but for the least int64, which stands for nothing.
            k: From 1.
        """
        ...

    def exchange(
        self, rows: Float[Tensor, "sent d_in"], sent: list[int], received: list[int]
    ) -> Float[Tensor, "received d_in"]:
        """Rows to and from the shards of the replica, in their order; the gradient goes back.

        Args:
            rows: The first `sent[0]` are for the first shard, and so on.
            sent: To each shard.
            received: From each shard.
        """
        ...

    def exchange_counts(self, counts: Int[Tensor, "shards some"]) -> Int[Tensor, "shards some"]:
        """The i-th row goes to the i-th shard of the replica; that of the result came from it."""
        ...

    def across_replicas(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks that hold the same shard; no gradient."""
        ...

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks of all replicas; no gradient."""
        ...


class WholeAxis(NamedTuple):
    """The axis of one process."""

    shard: int = 0
    shards: int = 1
    replica: int = 0
    replicas: int = 1

    def gather(self, x: Tensor) -> Tensor:
        return x

    def scatter_sum(self, parts: Tensor) -> Tensor:
        return parts

    def replicated(self, parameter: Tensor) -> Tensor:
        return parameter

    def kth_largest(self, keys: Tensor, k: int) -> Tensor:
        if k >= keys.shape[1]:
            return keys.amin(1)
        return keys.topk(k, dim=1).values[:, -1]

    def exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:  # noqa: ARG002 - all stay
        return rows

    def exchange_counts(self, counts: Tensor) -> Tensor:
        return counts

    def across_replicas(self, tensor: Tensor) -> Tensor:
        return tensor

    def total(self, tensor: Tensor) -> Tensor:
        return tensor


WHOLE = WholeAxis()
