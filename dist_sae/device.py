"""The device that a process computes on, and copies to and from it.

A process with LOCAL_RANK n uses GPU n of those that it sees.
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
    """Return the rank of this process on its machine: LOCAL_RANK, or else RANK, or else 0."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))


def n_gpus() -> int:
    """Return the number of GPUs that this process can use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a driver that is too old; `why_no_gpu` reports it
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def device_of(rank: int) -> torch.device:
    """Return the GPU for a local rank, or the CPU if there is no GPU.

    Raises:
        ConfigError: There are GPUs, but none for this rank.
    """
    if (gpus := n_gpus()) == 0:
        return torch.device("cpu")
    if rank >= gpus:
        raise ConfigError(
            f"this machine has {gpus} GPUs, but none for local rank {rank}; start fewer ranks here "
            f"(processes.trainers, model.tensor_parallel, index.latent_shards), {_REMEDY}"
        )
    return torch.device("cuda", rank)


def own_device() -> torch.device:
    """Return the device of this process. Raises like `device_of`."""
    return device_of(local_rank())


def why_no_gpu() -> str:
    """Return the reason why this process can use no GPU."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built for CPUs only"
    if os.environ.get(_VISIBLE) == "":
        return f"{_VISIBLE} is empty, which hides all GPUs"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as exc:
        sentence = " ".join(str(exc).split()).split(". ")[0].rstrip(".")
        return f"{sentence} (torch {torch.__version__})"
    return "no GPU is visible"


def apply_device_setting(setting: Literal["auto", "cpu", "cuda"]) -> str | None:
    """Apply `processes.device`: hide the GPUs, or check that one can be used.

    Call this before CUDA is initialized.

    Args:
        setting: Value of `processes.device`.

    Returns:
        A warning if the setting is `auto` and the machine has a GPU that cannot be used.

    Raises:
        ConfigError: The setting is `cuda`, and no GPU can be used.
    """
    if setting == "cpu":
        os.environ[_VISIBLE] = ""
    if setting == "cpu" or n_gpus():
        return None
    reason = why_no_gpu()
    if setting == "cuda":
        raise ConfigError(f"processes.device: cuda: {reason}; fix this, {_REMEDY}")
    if os.environ.get(_VISIBLE) == "" or not _has_gpu():
        return None
    return f"this machine's GPU is not used: {reason}; fix this, {_REMEDY}"


def _has_gpu() -> bool:
    """Return True if this machine has an NVIDIA GPU, whether or not torch can use it."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def check_gpus(key: str, ranks: int) -> None:
    """Check that ranks that exchange tensors have one GPU each, as NCCL requires, or all use CPUs.

    Args:
        key: The setting with the number of ranks, for the message.
        ranks: Number of ranks on this machine.

    Raises:
        ConfigError: There are GPUs, but fewer than ranks.
    """
    if 0 < (gpus := n_gpus()) < ranks:
        raise ConfigError(
            f"{key}: {ranks} ranks on this machine need a GPU each, but it has {gpus}; "
            f"lower {key}, {_REMEDY}"
        )


def share_gpus(groups: Sequence[int]) -> list[dict[str, str]]:
    """Divide the GPUs that this process sees among groups of processes that it will start.

    The processes of a group get different GPUs. Groups get different GPUs as long as there are
    enough. Further groups share GPUs, starting with those of the first group.

    Args:
        groups: Number of processes in each group, at most the number of GPUs.

    Returns:
        Environment variables for the processes of each group, which then choose their GPU by
        LOCAL_RANK. Empty if there are no GPUs.
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
    """Move a tensor to a device without changing its dtype, which is better converted there.

    A copy to a GPU is queued behind other work and reads pinned memory, so the host does not wait.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)  # no copy if pinned
    return tensor.to(device)


def copied_to_cpu(tensor: Tensor) -> Tensor:
    """Copy a tensor to pageable memory; from a GPU, in pieces through two pinned buffers.

    One buffer is filled while the other is emptied. The copy itself is not pinned, because pinned
    memory is never given back to the system.
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
    """Wait until a buffer is filled, and copy it to its place."""
    if filled is not None:
        buffer, place, arrived = filled
        arrived.synchronize()
        place.copy_(buffer)


@contextmanager
def in_tf32(device: torch.device) -> Iterator[None]:
    """Compute fp32 products on a GPU in TF32: factors with 11 bits, sums in fp32.

    Products take an eighth of the time. Only for measurements that are not compared between
    machines.
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
