"""The latent axis (`dictionaries/axis.py`), implemented with collectives between ranks."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_sae.dictionaries.axis import LatentAxis

# torch 2.13 introduces these names, and warns about the older ones
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

entered = 0
"""Number of collectives that this rank has entered."""
seconds = 0.0
"""Seconds spent in collectives. On a GPU, only the time to launch them."""
mark: Callable[[], Any] | None = None
"""Records a mark on the GPU's clock. None on a CPU, where `seconds` is the whole time."""
spans: list[tuple[Any, Any]] = []
"""Marks before and after each collective since the last `take_spans`."""


@dataclass(kw_only=True, eq=False)
class ShardedAxis(LatentAxis):
    """The axis over several ranks. A replica's ranks are neighbors: replica * shards + shard."""

    within: dist.ProcessGroup
    """The ranks of this replica."""
    across: dist.ProcessGroup
    """The ranks with this shard."""

    def gather(self, x: Tensor) -> Tensor:
        return _gathered(x, self.within, self.shards)

    def scatter_sum(self, parts: Tensor) -> Tensor:
        result: Tensor = _ScatterSum.apply(parts, self.within, self.shards)  # type: ignore[no-untyped-call]
        return result

    def replicated(self, parameter: Tensor) -> Tensor:
        result: Tensor = _Replicated.apply(parameter, self.within)  # type: ignore[no-untyped-call]
        return result

    def kth_largest(self, keys: Tensor, k: int) -> Tensor:
        """Return each row's k-th largest candidate. Each rank does an equal share of the rows."""
        if self.shards == 1:
            return super().kth_largest(keys, k)
        per_rank = keys.reshape(self.shards, -1, keys.shape[1])
        received = torch.empty_like(per_rank)
        with collective():
            dist.all_to_all_single(received, per_rank.contiguous(), group=self.within)
        candidates = received.transpose(0, 1).flatten(1)
        kth = candidates.topk(min(k, candidates.shape[1]), dim=1).values[:, -1]
        return _gathered(kth, self.within, self.shards)

    def exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        result: Tensor = _Exchange.apply(rows, sent, received, self.within)  # type: ignore[no-untyped-call]
        return result

    def exchange_counts(self, counts: Tensor) -> Tensor:
        ones = [1] * self.shards
        return _exchanged(counts, ones, ones, self.within)

    def broadcast_shard(self, tensor: Tensor, shard: int) -> Tensor:
        tensor = tensor.clone() if shard == self.shard else torch.empty_like(tensor)
        with collective():
            dist.broadcast(tensor, self.replica * self.shards + shard, self.within)
        return tensor

    def sum_replicas(self, tensor: Tensor) -> Tensor:
        return _summed(tensor, self.across)

    def sum_replicas_(self, tensor: Tensor) -> None:
        if self.replicas > 1:
            with collective():
                dist.all_reduce(tensor, group=self.across)

    def gather_replicas(self, tensor: Tensor) -> Tensor:
        return _gathered(tensor, self.across, self.replicas)

    def total(self, tensor: Tensor) -> Tensor:
        return _summed(tensor, None)


@dataclass(kw_only=True, eq=False)
class SameRowsAxis(ShardedAxis):
    """The axis when all ranks of a replica already have the same rows. For inference only."""

    def gather(self, x: Tensor) -> Tensor:
        return x

    def scatter_sum(self, parts: Tensor) -> Tensor:
        return _summed(parts, self.within)

    def kth_largest(self, keys: Tensor, k: int) -> Tensor:
        candidates = _gathered(keys.T, self.within, self.shards).T
        return candidates.topk(min(k, candidates.shape[1]), dim=1).values[:, -1]


class _ScatterSum(torch.autograd.Function):
    """Reduce-scatter of dim 0 forward, all-gather backward."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup, shards: int) -> Tensor:
        ctx.group, ctx.shards = group, shards
        if shards == 1:
            return parts.view_as(parts)
        own = parts.new_empty(len(parts) // shards, *parts.shape[1:])
        with collective():
            _reduce_scatter(own, parts.contiguous(), group=group)
        return own

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _gathered(gradient, ctx.group, ctx.shards), None, None


class _Replicated(torch.autograd.Function):
    """Identity forward, all-reduce backward."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, ctx.group), None


class _Exchange(torch.autograd.Function):
    """All-to-all of rows forward, the reverse all-to-all of gradients backward."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchanged(rows, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(gradient, ctx.received, ctx.sent, ctx.group), None, None, None


def _exchanged(
    rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    if len(sent) == 1:
        return rows.view_as(rows)
    result = rows.new_empty(sum(received), *rows.shape[1:])
    with collective():
        dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
    return result


def _gathered(tensor: Tensor, group: dist.ProcessGroup, ranks: int) -> Tensor:
    if ranks == 1:
        return tensor
    whole = tensor.new_empty(ranks * len(tensor), *tensor.shape[1:])
    with collective():
        _all_gather(whole, tensor.contiguous(), group=group)
    return whole


def _summed(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if dist.get_world_size(group) == 1:
        return tensor
    tensor = tensor.clone()
    with collective():
        dist.all_reduce(tensor, group=group)
    return tensor


@contextmanager
def collective() -> Iterator[None]:
    """Count the collective in a `with` block, and measure its time."""
    global entered, seconds  # noqa: PLW0603 - of the process, like the process groups
    entered += 1
    since = time.perf_counter()
    start = mark and mark()
    try:
        yield
    finally:
        seconds += time.perf_counter() - since
        if mark:
            spans.append((start, mark()))


def take_spans() -> list[tuple[Any, Any]]:
    """Return the marks of collectives since the last call."""
    taken = spans[:]
    spans.clear()
    return taken
