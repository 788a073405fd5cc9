"""The device that a process computes on, and copies to and from it.

A process uses the GPU of its own number (LOCAL_RANK) among those that it sees.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dist_sae.errors import ConfigError

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_REMEDY = "or set processes.device: cpu"
_STAGE_BYTES = 2**26


def local_rank() -> int:
    """Number of this process on its machine: LOCAL_RANK, else RANK, else 0."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))


def n_gpus() -> int:
    """Number of GPUs that this process can use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a driver that is too old: see `why_no_gpu`
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def device_of(rank: int) -> torch.device:
    """The GPU of this machine's process number `rank`; the CPU if there is no GPU.

    Raises:
        ConfigError: There are GPUs, but fewer than processes.
    """
    if (gpus := n_gpus()) == 0:
        return torch.device("cpu")
    if rank >= gpus:
        raise ConfigError(
            f"this machine has {gpus} GPUs, none for local rank {rank}; start fewer ranks here "
            f"(processes.trainers, model.tensor_parallel, index.latent_shards), {_REMEDY}"
        )
    return torch.device("cuda", rank)


def own_device() -> torch.device:
    """The device of this process; errors: see `device_of`."""
    return device_of(local_rank())


def why_no_gpu() -> str:
    """The reason why no GPU can be used, for a process that can use none."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built for the CPU alone"
    if os.environ.get(_VISIBLE) == "":
        return f"{_VISIBLE} is empty, which hides all GPUs"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as exc:
        sentence = " ".join(str(exc).split()).split(". ")[0].rstrip(".")
        return f"{sentence} (torch {torch.__version__})"
    return "no GPU is visible"


def settle_device(wish: Literal["auto", "cpu", "cuda"]) -> str | None:
    """Hide the GPUs, or make sure that there is one. To be called before CUDA is used.

    Args:
        wish: `processes.device`.

    Returns:
        A warning for `auto`, if the machine has a GPU that cannot be used.

    Raises:
        ConfigError: The wish is `cuda`, and no GPU can be used.
    """
    if wish == "cpu":
        os.environ[_VISIBLE] = ""
    if wish == "cpu" or n_gpus():
        return None
    reason = why_no_gpu()
    if wish == "cuda":
        raise ConfigError(f"processes.device: cuda: {reason}; correct that, {_REMEDY}")
    if os.environ.get(_VISIBLE) == "" or not _has_gpu():
        return None
    return f"the GPU of this machine is not used: {reason}; correct that, {_REMEDY}"


def _has_gpu() -> bool:
    """True if this machine has an NVIDIA GPU, whether or not torch can use it."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def check_gpus(key: str, ranks: int) -> None:
    """Check that ranks which exchange tensors have a GPU each, as NCCL wants, or all a CPU.

    Args:
        key: The setting that gives their number.
        ranks: Their number on this machine.

    Raises:
        ConfigError: They have not.
    """
    if 0 < (gpus := n_gpus()) < ranks:
        raise ConfigError(
            f"{key}: {ranks} ranks on this machine need a GPU each, and it has {gpus}; "
            f"lower it, {_REMEDY}"
        )


def share_gpus(groups: Sequence[int]) -> list[dict[str, str]]:
    """Share the GPUs that this process sees out to groups of processes that it will start.

    A group's processes get different GPUs, and groups different ones as far as there are enough;
    then the first ones are shared, beginning with the first group's.

    Args:
        groups: Processes of each group: no more than there are GPUs.

    Returns:
        Environment variables of the processes of each group, which find their own GPU by
        LOCAL_RANK; empty where there are no GPUs.
    """
    gpus = n_gpus()
    if gpus == 0:
        return [{} for _ in groups]
    given = os.environ.get(_VISIBLE)
    names = given.split(",")[:gpus] if given else [str(number) for number in range(gpus)]
    shares, first = [], 0
    for processes in groups:
        own = [names[(first + i) % gpus] for i in range(processes)]
        shares.append({_VISIBLE: ",".join(own)})
        first += processes
    return shares


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device, of the same type: what changes the type is better done there.

    A GPU fetches it from pinned memory, behind the work that is queued, and the host goes on.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)  # what is pinned is not copied
    return tensor.to(device)


def copied_to_cpu(tensor: Tensor) -> Tensor:
    """A copy in ordinary memory. Off a GPU it comes in pieces, by two pinned buffers in turn.

    While one is filled, the other is emptied. Memory that is pinned is kept for good, so the whole
    copy is not.
    """
    if tensor.device.type != "cuda":
        return tensor.to("cpu", copy=True)
    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    row_bytes = max(1, tensor.nbytes // max(1, len(tensor)))
    n = max(1, min(len(tensor), _STAGE_BYTES // row_bytes))
    shape = (n, *tensor.shape[1:])
    buffers = [torch.empty(shape, dtype=tensor.dtype, pin_memory=True) for _ in range(2)]
    stream = torch.cuda.current_stream(tensor.device)
    before: tuple[Tensor, Tensor, torch.cuda.Event] | None = None
    for number, (part, place) in enumerate(
        zip(torch.split(tensor, n), torch.split(copy, n), strict=True)
    ):
        buffer = buffers[number % 2][: len(part)]
        buffer.copy_(part, non_blocking=True)
        arrived = stream.record_event()
        _emptied(before)
        before = buffer, place, arrived
    _emptied(before)
    return copy


def _emptied(filled: tuple[Tensor, Tensor, torch.cuda.Event] | None) -> None:
    """Copy a buffer to its place once it is filled."""
    if filled is not None:
        buffer, place, arrived = filled
        arrived.synchronize()
        place.copy_(buffer)


@contextmanager
def in_tf32(device: torch.device) -> Iterator[None]:
    """Compute fp32 products of a GPU in TF32 meanwhile: factors of 11 bits, sums in fp32.

    They take an eighth of the time. For measurements that nobody compares between machines.
    """
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before
