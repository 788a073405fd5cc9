"""Dispatch of rows to the ranks of their experts, and the way back."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_sae.dictionaries.axis import LatentAxis


class ExpertExchange:
    """An exchange that sends rows to the ranks of their experts, and returns the results.

    Args:
        axis: This rank's place.
        experts: Experts of this rank's rows, numbered over all shards.
        n_experts: Number of experts over all shards.
        extra: Extra device numbers to copy to the host together with the row counts.
    """

    def __init__(
        self,
        axis: LatentAxis,
        experts: Int[Tensor, "rows chosen"],
        n_experts: int,
        extra: Int[Tensor, " some"] | None = None,
    ) -> None:
        flat, per_shard = experts.flatten(), n_experts // axis.shards
        self._axis = axis
        self._chosen = experts.shape[1]
        self._order = flat.argsort(stable=True)  # by expert, and so by shard
        self.load = torch.zeros(n_experts, dtype=torch.int64, device=flat.device)
        """Number of this rank's rows for each expert."""
        self.load.scatter_add_(0, flat, torch.ones_like(flat))
        counts = axis.exchange_counts(self.load.view(axis.shards, per_shard))
        sent, extra = (
            self.load.view(axis.shards, per_shard).sum(1),
            flat[:0] if extra is None else extra,
        )
        parts = [sent, counts.sum(1), counts.sum(0), extra]
        numbers: Iterator[int] = iter(torch.cat(parts).tolist())  # the only host sync
        self._sent, self._received, self.arrived, self.extra = (
            list(islice(numbers, len(part))) for part in parts
        )
        """Numbers of rows sent to each shard, received from each shard, and received for each of
        this shard's experts, and the values of `extra`."""
        self._by_expert: Tensor | None = None  # order by expert; rows arrive by rank, then expert
        if axis.shards > 1:
            experts = torch.arange(per_shard, device=flat.device).repeat(axis.shards)
            by_rank = experts.repeat_interleave(counts.flatten(), output_size=sum(self.arrived))
            self._by_expert = by_rank.argsort(stable=True)

    def dispatch(self, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "arrived d_in"]:
        """Send this rank's rows, and return those of this shard's experts, sorted by expert.

        No gradient.
        """
        sent = x.index_select(0, self._order // self._chosen)
        rows = self._axis.exchange(sent, self._sent, self._received)
        return rows if self._by_expert is None else rows.index_select(0, self._by_expert)

    def combine(self, parts: Float[Tensor, "arrived d_in"]) -> Float[Tensor, "rows chosen d_in"]:
        """Send the experts' results back to the ranks of their rows.

        The backward pass sends gradients to the experts.
        """
        if self._by_expert is not None:
            parts = _unpermute(parts, self._by_expert)
        returned = self._axis.exchange(parts, self._received, self._sent)
        return _unpermute(returned, self._order).view(-1, self._chosen, parts.shape[1])


class _Unpermute(torch.autograd.Function):
    """Inverse of `x[order]`. The backward pass is a gather; that of indexing would accumulate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor) -> Tensor:
        ctx.order = order
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        return x.index_select(0, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.index_select(0, ctx.order), None


def _unpermute(x: Tensor, order: Tensor) -> Tensor:
    result: Tensor = _Unpermute.apply(x, order)  # type: ignore[no-untyped-call]
    return result
