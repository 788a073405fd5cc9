"""The ranks of a training job and what they say to each other."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dist_sae.dictionaries.axis import LatentAxis
from dist_sae.distributed.axis import ShardedAxis
from dist_sae.distributed.rendezvous import Ranks
from dist_sae.errors import ConfigError, DivergedError

_COLLECTIVE_TIMEOUT = timedelta(minutes=10)
_FOREVER = timedelta(days=365)


class Mesh(NamedTuple):
    """This rank's place among all, and what they say to each other."""

    rank: int
    world: int
    device: torch.device
    axis: LatentAxis
    """Its place in `replicas` x `shards`."""
    control: dist.ProcessGroup | None = None
    """For words between the hosts, without a time limit: a rank may wait long for data."""
    spare: dist.ProcessGroup | None = None
    """The same once more, for one thread beside the training."""

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for all."""
        return self.rank == 0

    def agree(self, *, wish: bool) -> bool:
        """Whether any rank has the wish; waits for the last rank to say, however long it takes."""
        return self.meet(wish=wish, waited=0.0)[0]

    def meet(self, *, wish: bool, waited: float) -> tuple[bool, float]:
        """Whether any rank has the wish, and the longest that one has waited, in seconds."""
        if self.world == 1:
            return wish, waited
        said = torch.tensor([wish, waited], dtype=torch.float64)
        dist.all_reduce(said, dist.ReduceOp.MAX, self.control)
        wished, longest = said.tolist()
        return bool(wished), longest

    def beside(self) -> "Mesh":
        """The same ranks on a line of their own, for one thread beside the training."""
        return self._replace(control=self.spare)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.agree(wish=False)

    def everyones(self, value: Any) -> list[Any]:
        """A picklable value of every rank, in their order."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, self.control)
        return values


@contextmanager
def join_mesh(ranks: Ranks, shards: int = 1) -> Iterator[Mesh]:
    """Make the groups of ranks that compute together.

    Args:
        ranks: All of them.
        shards: Into how many pieces the dictionary is cut; divides the number of ranks.

    Raises:
        ConfigError: There are more ranks on this machine than GPUs.
    """
    rank, world = ranks.rank, ranks.world
    cuda = torch.cuda.is_available()
    if cuda and ranks.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"this machine has {torch.cuda.device_count()} GPUs, none for local rank "
            f"{ranks.local_rank}; start fewer ranks here (processes.trainers, model.shards), or "
            f"set CUDA_VISIBLE_DEVICES= to use the CPU"
        )
    device = torch.device("cuda", ranks.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    # DeepSpeed wants a process group of one rank as well; it needs no port
    store = ranks.connect() if world > 1 else dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world, timeout=_COLLECTIVE_TIMEOUT
    )
    control = spare = None
    if world > 1:
        control, spare = (dist.new_group(backend="gloo", timeout=_FOREVER) for _ in range(2))
    try:
        yield Mesh(rank, world, device, _split(rank, world, shards), control, spare)
    finally:
        dist.destroy_process_group()


def _split(rank: int, world: int, shards: int) -> ShardedAxis:
    """The ranks as `replicas` x `shards`; neighbours, on one host where that fits, share a replica.

    Every rank takes part in the making of every group.
    """
    grid = torch.arange(world).reshape(-1, shards)
    replica, shard = divmod(rank, shards)
    within = [dist.new_group(ranks.tolist()) for ranks in grid][replica]
    across = [dist.new_group(ranks.tolist()) for ranks in grid.T][shard]
    return ShardedAxis(shard, shards, replica, len(grid), within, across)


def check_replicated(mesh: Mesh, tensors: Iterable[Tensor]) -> None:
    """Make sure that all ranks hold the same bits of what they all hold. Collective.

    Raises:
        DivergedError: They do not; what they would save is not one dictionary.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().numpy().tobytes())
    digests = mesh.everyones(digest.hexdigest())
    if len(set(digests)) > 1:
        odd = [rank for rank, other in enumerate(digests) if other != digests[0]]
        raise DivergedError(
            f"ranks {odd} hold other shared parameters than rank 0, so their dictionaries are no "
            f"longer one; nothing was saved. Start again from the last checkpoint, and report it"
        )
