"""The ranks of a job: devices, process groups, and collectives for small Python values."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from pydantic import ConfigDict, TypeAdapter
from torch import Tensor, nn

from dist_sae.device import device_of, own_device
from dist_sae.dictionaries.axis import WHOLE, LatentAxis
from dist_sae.distributed import transport
from dist_sae.distributed.axis import SameRowsAxis, ShardedAxis
from dist_sae.distributed.rendezvous import Ranks
from dist_sae.errors import DivergedError

# timeout of every group: only the watch can tell which rank is lost or hung. A group that times out
# does not name the rank, and an NCCL group then ends the process with exit code 134
_NO_LIMIT = timedelta(days=365)
_NUMBERS = ConfigDict(ser_json_inf_nan="constants")  # otherwise infinity arrives as None
T = TypeVar("T")


class Mesh(NamedTuple):
    """This rank, its device and its process groups."""

    rank: int
    world: int
    device: torch.device
    axis: LatentAxis
    """This rank's place in the grid of `replicas` x `shards`."""
    control: dist.ProcessGroup | None = None
    """Control group, over gloo."""
    background_control: dist.ProcessGroup | None = None
    """Second control group, for saving."""
    hosts: tuple[str, ...] = ()
    """Hosts by rank, for messages."""
    groups_here: int = 1
    """Number of rank groups, each with its own jobs, that have ranks on this rank's host."""

    @property
    def is_first(self) -> bool:
        """True on rank 0, which logs and writes manifests."""
        return self.rank == 0

    def any_rank(self, condition: bool) -> bool:  # noqa: FBT001 - the name asks for it
        """Return True if the condition holds on any rank. Collective."""
        return self.any_rank_and_max(condition, 0.0)[0]

    def any_rank_and_max(self, condition: bool, value: float) -> tuple[bool, float]:  # noqa: FBT001
        """Return whether the condition holds on any rank, and the maximum value. One collective."""
        if self.world == 1:
            return condition, value
        both = torch.tensor([condition, value], dtype=torch.float64)
        dist.all_reduce(both, dist.ReduceOp.MAX, self.control)
        holds, largest = both.tolist()
        return bool(holds), largest

    def in_background(self) -> "Mesh":
        """Return this mesh with the second control group, for the thread that saves."""
        return self._replace(control=self.background_control)

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        self.any_rank(False)  # noqa: FBT003

    def on_first_rank(self, work: Callable[[], T], kind: Any = Any) -> T:
        """Do work on rank 0 only, and return its result on all ranks. Collective.

        Args:
            work: Function that does the work.
            kind: Type as which the result is read from JSON. `Any` allows JSON's own types.
        """
        if self.world == 1:
            return work()
        message = _Message(kind)
        data = message.encode(work()) if self.is_first else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor(len(data))
        dist.broadcast(size, 0, self.control)
        data = data if self.is_first else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, 0, self.control)
        found: T = message.decode(data, 0)
        return found

    def sharded(self, shards: int) -> "Mesh":
        """Return this mesh with its ranks arranged as replicas of `shards` ranks. Collective."""
        if shards == self.axis.shards:
            return self
        return self._replace(axis=_split(self.rank, self.world, shards))

    def same_rows(self) -> "Mesh":
        """Return this mesh for inference, with the same rows on all ranks of a replica."""
        assert isinstance(self.axis, ShardedAxis)
        return self._replace(axis=SameRowsAxis(**vars(self.axis)))

    def all_gather_objects(self, value: T, kind: Any = Any) -> list[T]:
        """Gather every rank's value, in the order of ranks. Collective.

        Args:
            value: This rank's value.
            kind: Type as which the values are read from JSON. `Any` allows JSON's own types.
        """
        if self.world == 1:
            return [value]
        message = _Message(kind)
        own = message.encode(value)
        sizes = [torch.empty(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(own)]), self.control)
        longest = max(map(int, sizes))
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.world)]
        dist.all_gather(parts, nn.functional.pad(own, (0, longest - len(own))), self.control)
        return [
            message.decode(part[: int(size)], rank)
            for rank, (part, size) in enumerate(zip(parts, sizes, strict=True))
        ]


class _Message:
    """A message between ranks, as JSON, because loading a pickle could run any code."""

    def __init__(self, kind: Any) -> None:
        self._values = TypeAdapter[Any](kind, config=_NUMBERS)

    def encode(self, value: Any) -> Tensor:
        text = json.dumps(self._values.dump_python(value, mode="json"))
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    def decode(self, data: Tensor, rank: int) -> Any:
        try:
            return self._values.validate_python(json.loads(data.numpy().tobytes()))
        except (ValueError, RecursionError) as exc:
            raise DivergedError(
                f"rank {rank} sent an invalid message "
                f"({str(exc).splitlines()[0]}); find out what else connects to the ranks' ports, "
                f"and start again"
            ) from exc


SINGLE_PROCESS = Mesh(0, 1, torch.device("cpu"), WHOLE)
"""The mesh of a single process that uses no GPU."""


def single_process() -> Mesh:
    """Return the mesh of a single process on its own device (`own_device`)."""
    return SINGLE_PROCESS._replace(device=own_device())


@contextmanager
def join_mesh(
    ranks: Ranks, shards: int = 1, shared_by_all: torch.device | None = None
) -> Iterator[Mesh]:
    """Create the process groups of a job.

    Args:
        ranks: All ranks of the job.
        shards: Number of latent shards; divides the number of ranks.
        shared_by_all: A device that all ranks share over gloo, for checks on a machine with one
            GPU: NCCL allows only one rank per GPU. None gives each rank its own device.

    Raises:
        ConfigError: There are more ranks on this machine than GPUs, or NCCL uses sockets although
            the pod asks for RDMA.
    """
    rank, world = ranks.rank, ranks.world
    device = shared_by_all or device_of(ranks.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" and shared_by_all is None else "gloo"
    # otherwise gloo connects all pairs of each group: a thousand sockets per rank with 512 ranks
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    # DeepSpeed needs a process group even for one rank; HashStore opens no port for it
    store = ranks.connect() if world > 1 else dist.HashStore()  # type: ignore[attr-defined]
    store.set_timeout(_NO_LIMIT)  # NCCL's ranks wait there again before their first collective
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_NO_LIMIT)
    control = background = None
    if world > 1:
        control, background = (_group(backend="gloo") for _ in range(2))
    try:
        if backend == "nccl" and world > 1 and transport.rdma_is_requested():
            dist.all_reduce(torch.zeros(1, device=device))  # NCCL connects at the first collective
            transport.check_rdma()
        axis = _split(rank, world, shards)
        yield Mesh(rank, world, device, axis, control, background, ranks.hosts, ranks.groups_here)
    finally:
        dist.destroy_process_group()


def _split(rank: int, world: int, shards: int) -> ShardedAxis:
    """Arrange the ranks as `replicas` x `shards`.

    Neighboring ranks, which mostly share a host, form a replica. Every rank must create every
    group, because creating one is collective.
    """
    grid = torch.arange(world).reshape(-1, shards)
    replica, shard = divmod(rank, shards)
    within = [_group(ranks.tolist()) for ranks in grid][replica]
    across = [_group(ranks.tolist()) for ranks in grid.T][shard]
    return ShardedAxis(shard, shards, replica, len(grid), within=within, across=across)


def _group(ranks: list[int] | None = None, backend: str | None = None) -> dist.ProcessGroup:
    # without an explicit timeout it would have torch's default, not that of the first group
    group: dist.ProcessGroup = dist.new_group(ranks, timeout=_NO_LIMIT, backend=backend)
    return group


def check_replicated(mesh: Mesh, tensors: Iterable[Tensor]) -> None:
    """Check that replicated tensors have the same bits on all ranks. Collective.

    Raises:
        DivergedError: The tensors differ, so the ranks' parts do not form one dictionary.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().numpy().tobytes())
    digests = mesh.all_gather_objects(digest.hexdigest(), str)
    if len(set(digests)) > 1:
        odd = [rank for rank, other in enumerate(digests) if other != digests[0]]
        raise DivergedError(
            f"ranks {odd} differ from rank 0 in parameters that all ranks share; nothing was "
            f"saved. Start again from the last checkpoint, and report it"
        )
