"""Ranks of a mesh as threads of this process. Gradients do not flow between ranks."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from dist_sae.dictionaries.axis import LatentAxis

T = TypeVar("T")


class Exchange:
    """Place where `n` ranks exchange values."""

    def __init__(self, n: int) -> None:
        self._barrier = threading.Barrier(n, timeout=60)
        self._held: list[Any] = [None] * n

    def swap(self, rank: int, value: T) -> list[T]:
        self._held[rank] = value
        self._barrier.wait()
        everyones = list(self._held)
        self._barrier.wait()  # no rank may write again before all have read
        return everyones

    def give_up(self) -> None:
        self._barrier.abort()


class ThreadAxis(LatentAxis):
    """A rank's `LatentAxis`."""

    def __init__(self, exchange: Exchange, rank: int, shards: int, replicas: int) -> None:
        self.replica, self.shard = divmod(rank, shards)
        self.shards, self.replicas = shards, replicas
        self._exchange, self._rank = exchange, rank

    def _within(self, value: T) -> list[T]:
        first = self.replica * self.shards
        return self._exchange.swap(self._rank, value)[first : first + self.shards]

    def gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._within(x))

    def scatter_sum(self, parts: Tensor) -> Tensor:
        return torch.stack(self._within(parts)).sum(0).chunk(self.shards)[self.shard]

    def replicated(self, parameter: Tensor) -> Tensor:
        return parameter

    def kth_largest(self, keys: Tensor, k: int) -> Tensor:
        candidates = torch.cat(self._within(keys), 1)
        return candidates.topk(min(k, candidates.shape[1]), dim=1).values[:, -1]

    def exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        packets = [p[self.shard] for p in self._within(torch.split(rows, sent))]
        assert [len(packet) for packet in packets] == received
        return torch.cat(packets)

    def exchange_counts(self, counts: Tensor) -> Tensor:
        return torch.stack([of_rank[self.shard] for of_rank in self._within(counts)])

    def sum_replicas(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._exchange.swap(self._rank, tensor)[self.shard :: self.shards]).sum(
            0
        )

    def sum_replicas_(self, tensor: Tensor) -> None:
        tensor.copy_(self.sum_replicas(tensor.clone()))  # clone: other ranks may still read it

    def gather_replicas(self, tensor: Tensor) -> Tensor:
        return torch.cat(self._exchange.swap(self._rank, tensor)[self.shard :: self.shards])

    def total(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._exchange.swap(self._rank, tensor)).sum(0)


def on_ranks(replicas: int, shards: int, work: Callable[[ThreadAxis], T]) -> list[T]:
    """Run `work` on each rank, and return the results in the order of ranks."""
    n = replicas * shards
    exchange = Exchange(n)

    def run(rank: int) -> T:
        try:
            return work(ThreadAxis(exchange, rank, shards, replicas))
        except BaseException:
            exchange.give_up()
            raise

    with ThreadPoolExecutor(n) as pool:
        futures = [pool.submit(run, rank) for rank in range(n)]
        failed = [exc for f in futures if (exc := f.exception()) is not None]
        cause = [exc for exc in failed if not isinstance(exc, threading.BrokenBarrierError)]
        if failed:
            raise (cause or failed)[0]
        return [future.result() for future in futures]
