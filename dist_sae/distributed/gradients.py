"""Gradients of encoder and decoder over replicas, exchanged dense or by entry.

The gradient of a weight is C^T rows: each latent's sum of rows, with the coefficients of its
entries. Replicas can sum their gradients, which are as large as the weight. Or each gathers the
rows and entries of all of them and sums for itself. That is fewer bytes while the global batch has
fewer rows than about twice the latents of a shard, but each replica does the sums of all: measured
between processes of one machine, it takes as long at .15 of the bytes and a tenth longer at .3. So
it is done where it is at most a quarter. Either way the sum is over the same entries.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dist_sae.config.dictionary import CountsLatentsConfig, DictionaryConfig
from dist_sae.dictionaries.axis import LatentAxis
from dist_sae.kernels import Entries, Kernels

_INT32 = 4
AT_MOST = 0.25
"""Share of the bytes of gradients up to which rows and entries are exchanged instead."""


class Exchange(NamedTuple):
    """Bytes that a rank sends for the gradient of a weight, in a ring of the replicas."""

    dense: float
    """By summing gradients."""
    by_entry: float
    """By gathering rows and entries."""

    @classmethod
    def of(cls, replicas: int, weight: int, rows: int, entries: float, itemsize: int) -> "Exchange":
        """Count them.

        Args:
            replicas: Replicas that share a batch.
            weight: Elements of this shard's weight.
            rows: Elements of a replica's rows.
            entries: The most entries that a replica has in a shard.
            itemsize: Bytes of an element.
        """
        dense = 2 * (replicas - 1) / replicas * weight * itemsize
        return cls(dense, (replicas - 1) * (rows * itemsize + entries * (itemsize + 2 * _INT32)))

    @property
    def is_by_entry(self) -> bool:
        """Whether rows and entries are few enough bytes."""
        return self.by_entry < AT_MOST * self.dense


def is_summed_by_entry(config: DictionaryConfig) -> bool:
    """Whether the gradients of W_enc and W_dec are nothing but sums over entries, by latent.

    Not so with a penalty, which adds gradients of norms and of dense steps, nor with experts, which
    get unequal numbers of rows on each replica.
    """
    return isinstance(config, CountsLatentsConfig) and not config.n_experts


class ReplicaSums:
    """`Kernels.sum_by_latent` over the rows of all replicas. Collective.

    Args:
        kernels: The sparse products of one replica.
        axis: This rank's place.
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
        """See `Kernels.sum_by_latent`. All replicas have equally many rows."""
        axis, sum_by_latent = self._axis, self._kernels.sum_by_latent
        of_all = self._counts_of(entries)
        counts = [of_shards[axis.shard] for of_shards in of_all]
        # of all shards, so that all do the same: the watch compares the collectives of all ranks
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
            along if along is None else axis.across_replicas(along),
        )

    def _counts_of(self, entries: Entries) -> list[list[int]]:
        """Numbers of each replica's entries in each shard.

        The host waits once for the two gradients of a step.
        """
        latents, axis = entries.latents, self._axis
        if latents is not self._latents:
            counts = torch.zeros(axis.replicas, axis.shards, dtype=torch.int64)
            counts[axis.replica, axis.shard] = len(latents)
            self._latents, self._counts = latents, axis.total(counts.to(latents.device)).tolist()
        return self._counts

    def _gathered(self, own: Tensor, counts: list[int], most: int) -> Tensor:
        """All replicas' rows in the order of replicas: `counts` of each, at most `most`."""
        padded = functional.pad(own, (0, 0, 0, most - len(own)))
        everyones = torch.split(self._axis.gather_replicas(padded), most)
        return torch.cat([part[:count] for part, count in zip(everyones, counts, strict=True)])
