"""Gradients of encoder and decoder over replicas, exchanged dense or by entry.

The gradient of a weight is C^T rows: each latent's sum of rows, weighted with the coefficients of
its entries. It can be summed over replicas in two ways:

- dense: replicas all-reduce their gradients, which are as large as the weight;
- by entry: each replica gathers the rows and entries of all replicas, and computes the whole sum.

The exchange by entry sends fewer bytes while the global batch has fewer rows than about twice the
latents of a shard, but each replica repeats the sums of all. Measured between processes of one
machine, it takes as long as the dense one at 0.15 of its bytes, and a tenth longer at 0.3. So it is
used up to a quarter. Either way, the sum is over the same entries.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dist_sae.config.dictionary import DictionaryConfig, KSelectionConfig
from dist_sae.dictionaries.axis import LatentAxis
from dist_sae.kernels import Entries, Kernels

_INT32 = 4
MAX_BYTES_SHARE = 0.25
"""Rows and entries are exchanged if they take less than this share of the gradients' bytes."""


class Exchange(NamedTuple):
    """Bytes that a rank sends for the gradient of one weight, in a ring of the replicas."""

    dense: float
    """Bytes for summing gradients."""
    by_entry: float
    """Bytes for gathering rows and entries."""

    @classmethod
    def of(cls, replicas: int, weight: int, rows: int, entries: float, itemsize: int) -> "Exchange":
        """Compute the bytes.

        Args:
            replicas: Number of replicas that share a batch.
            weight: Number of elements in this shard's weight.
            rows: Number of elements in a replica's rows.
            entries: Maximum number of entries that a replica has in a shard.
            itemsize: Bytes per element.
        """
        dense = 2 * (replicas - 1) / replicas * weight * itemsize
        return cls(dense, (replicas - 1) * (rows * itemsize + entries * (itemsize + 2 * _INT32)))

    @property
    def is_by_entry(self) -> bool:
        """Whether rows and entries take few enough bytes."""
        return self.by_entry < MAX_BYTES_SHARE * self.dense


def is_summed_by_entry(config: DictionaryConfig) -> bool:
    """Return whether the gradients of W_enc and W_dec consist only of sums over entries, by latent.

    They do not with a penalty, which adds gradients of norms and of dense steps. With experts, the
    replicas' numbers of rows differ, so they cannot be gathered.
    """
    return isinstance(config, KSelectionConfig) and not config.n_experts


class ReplicaSums:
    """`Kernels.sum_by_latent` over the rows of all replicas. Collective.

    Args:
        kernels: The sparse products of one replica.
        axis: This rank's place among shards and replicas.
    """

    def __init__(self, kernels: Kernels, axis: LatentAxis) -> None:
        self._kernels = kernels
        self._axis = axis
        self._latents: Tensor | None = None
        self._counts: list[list[int]] = []

    def __call__(
        self,
        coefficients: Tensor,
        entries: Entries,
        rows: Tensor,
        W: Tensor | None = None,
        along: Tensor | None = None,
    ) -> Tensor:
        """See `Kernels.sum_by_latent`. All replicas must have the same number of rows."""
        axis, sum_by_latent = self._axis, self._kernels.sum_by_latent
        of_all = self._counts_of(entries)
        counts = [of_shards[axis.shard] for of_shards in of_all]
        # over all shards, so that all ranks choose the same way to exchange: the watch compares
        # their numbers of collectives
        most = max(map(max, of_all))
        weight = entries.n_latents * rows.shape[1]
        exchange = Exchange.of(axis.replicas, weight, rows.numel(), most, rows.itemsize)
        if not exchange.is_by_entry or not most:
            sums = sum_by_latent(coefficients, entries, rows, W, along)
            axis.sum_replicas_(sums)
            return sums
        places = torch.stack([entries.latents, entries.rows], 1).int()
        latents, numbers = self._gathered(places, counts, most).long().unbind(1)
        firsts = len(rows) * torch.arange(axis.replicas, device=rows.device)
        every = Entries(latents, entries.starts, entries.n_latents)
        every.rows = numbers + torch.cat([firsts[i].expand(n) for i, n in enumerate(counts)])
        return sum_by_latent(
            self._gathered(coefficients[:, None], counts, most)[:, 0],
            every,
            axis.gather_replicas(rows),
            W,
            along if along is None else axis.sum_replicas(along),
        )

    def _counts_of(self, entries: Entries) -> list[list[int]]:
        """Return the number of each replica's entries in each shard.

        The host waits only once for both gradients of a step.
        """
        latents, axis = entries.latents, self._axis
        if latents is not self._latents:
            counts = torch.zeros(axis.replicas, axis.shards, dtype=torch.int64)
            counts[axis.replica, axis.shard] = len(latents)
            self._latents, self._counts = latents, axis.total(counts.to(latents.device)).tolist()
        return self._counts

    def _gathered(self, own: Tensor, counts: list[int], most: int) -> Tensor:
        """Gather all replicas' rows in the order of replicas: `counts` of each, at most `most`."""
        padded = functional.pad(own, (0, 0, 0, most - len(own)))
        everyones = torch.split(self._axis.gather_replicas(padded), most)
        return torch.cat([part[:count] for part, count in zip(everyones, counts, strict=True)])
