"""The ranks of a training job and what they say to each other."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dist_sae.errors import ConfigError

_COLLECTIVE_TIMEOUT = timedelta(minutes=10)


class Mesh(NamedTuple):
    """This rank's place. The `data` axis: every rank has its own rows of each batch."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for all."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks; a new tensor."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def any(self, flags: Tensor) -> Tensor:
        """Logical or over the ranks, element by element."""
        return self._reduced(flags.to(torch.uint8), dist.ReduceOp.MAX).bool()

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.sum(torch.zeros((), device=self.device))

    def _reduced(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        if self.world == 1:
            return tensor
        tensor = tensor.clone()
        dist.all_reduce(tensor, op)
        return tensor


@contextmanager
def join_mesh(expected_world: int) -> Iterator[Mesh]:
    """Meet the other ranks, as RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT say.

    Without these variables the job is this one process.

    Raises:
        ConfigError: The launcher started another number of ranks than the run file names.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", str(rank)))
    if world != expected_world:
        raise ConfigError(
            f"processes.trainers is {expected_world}, but WORLD_SIZE is {world}; "
            f"start {expected_world} ranks or set processes.trainers"
        )
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    if world > 1:
        dist.init_process_group(backend, timeout=_COLLECTIVE_TIMEOUT)
    else:  # DeepSpeed wants a process group even so; this one needs no port
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield Mesh(rank, world, device)
    finally:
        dist.destroy_process_group()
