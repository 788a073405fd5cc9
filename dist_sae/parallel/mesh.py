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
_FOREVER = timedelta(days=365)


class Mesh(NamedTuple):
    """This rank's place. The `data` axis: every rank has its own rows of each batch."""

    rank: int
    world: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    """For words between the hosts, without a time limit: a rank may wait long for data."""

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for all."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def any(self, flags: Tensor) -> Tensor:
        """Logical or over the ranks, element by element."""
        return self._reduced(flags.to(torch.uint8), dist.ReduceOp.MAX).bool()

    def agree(self, *, wish: bool) -> bool:
        """Whether any rank has the wish; waits for the last rank to say, however long it takes."""
        return bool(
            self._reduced(torch.tensor(wish, dtype=torch.uint8), dist.ReduceOp.MAX, self.control)
        )

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.agree(wish=False)

    def _reduced(
        self, tensor: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None = None
    ) -> Tensor:
        if self.world == 1:
            return tensor
        tensor = tensor.clone()
        dist.all_reduce(tensor, op, group)
        return tensor


@contextmanager
def join_mesh(expected_world: int) -> Iterator[Mesh]:
    """Meet the other ranks, as RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT say.

    Without these variables the job is this one process.

    Raises:
        ConfigError: The launcher started another number of ranks than the run file names, more
            than there are GPUs, or told them no place to meet.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", str(rank)))
    if world != expected_world:
        raise ConfigError(
            f"processes.trainers is {expected_world}, but WORLD_SIZE is {world}; "
            f"start {expected_world} ranks or set processes.trainers"
        )
    cuda = torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"this machine has {torch.cuda.device_count()} GPUs, none for local rank {local_rank}; "
            f"lower processes.trainers, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    control = None
    if world > 1:
        try:
            dist.init_process_group(backend, timeout=_COLLECTIVE_TIMEOUT)
        except (dist.DistError, ValueError) as exc:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise ConfigError(
                f"MASTER_ADDR:MASTER_PORT {address}: the ranks cannot meet there "
                f"({str(exc).splitlines()[0]}); give an address and a free port"
            ) from exc
        control = dist.new_group(backend="gloo", timeout=_FOREVER)
    else:  # DeepSpeed wants a process group even so; this one needs no port
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield Mesh(rank, world, device, control)
    finally:
        dist.destroy_process_group()
