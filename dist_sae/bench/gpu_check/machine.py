"""Stage `machine`: versions, and the hardware rates that limit everything else."""

import importlib.util
from collections.abc import Iterator
from functools import partial

import torch

from dist_sae.bench.gpu_check.stage import Record, StageContext, comparison, measurement, seconds_of
from dist_sae.device import apply_device_setting, copied_to_cpu
from dist_sae.environment import hardware, versions

_WIDTHS = (1024, 4096, 8192, 16_384, 65_536)  # latents per chunk


def machine(context: StageContext) -> Iterator[Record]:
    """Report versions, then rates of copies on, to and off the device, and of products."""
    apply_device_setting("cpu" if context.is_dry else "cuda")
    yield _versions(context)
    yield _copy(context)
    yield from _products(context)
    yield from _to_device(context)
    yield _off_device(context)


def _versions(context: StageContext) -> Record:
    numbers: Record = {"hardware": hardware(), **versions(), "cuda": torch.version.cuda}
    numbers["triton"] = importlib.util.find_spec("triton") is not None
    if not context.is_dry:
        properties = torch.cuda.get_device_properties(context.device)
        numbers["capability"] = f"{properties.major}.{properties.minor}"
        numbers["memory_bytes"] = properties.total_memory
    return measurement("versions", **numbers)


def _copy(context: StageContext) -> Record:
    n_bytes = 2**20 if context.is_dry else 2**31
    one = torch.ones(n_bytes, dtype=torch.uint8, device=context.device)
    other = torch.empty_like(one)
    seconds = seconds_of(lambda: other.copy_(one), context.device)
    return measurement("copy on the device", bytes_per_second=2 * n_bytes / seconds)


def _products(context: StageContext) -> Iterator[Record]:
    """Measure FLOP/s of a training step's x W^T, by the number of latents multiplied at once."""
    rows = 64 if context.is_dry else 16_384
    for d_in in (16,) if context.is_dry else (768, 4096):
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(rows, d_in, device=context.device).to(dtype)
            rates = {}
            for width in _WIDTHS[:1] if context.is_dry else _WIDTHS:
                W = torch.randn(width, d_in, device=context.device).to(dtype)
                out = torch.empty(rows, width, dtype=dtype, device=context.device)
                seconds = seconds_of(partial(torch.mm, x, W.T, out=out), context.device)
                rates[width] = 2 * rows * d_in * width / seconds
            name = str(dtype).removeprefix("torch.")
            yield measurement(f"product, {d_in} wide, {name}", flops_per_second_by_width=rates)


def _to_device(context: StageContext) -> Iterator[Record]:
    """Time copies of a batch to the device: pageable bf16 as stored, fp32, and pinned bf16."""
    rows, d_in = (64, 16) if context.is_dry else (16_384, 4096)
    pageable = torch.randn(rows, d_in).bfloat16()
    ways = {"pageable bf16": pageable.to, "fp32 converted on the CPU": pageable.float().to}
    if not context.is_dry:
        ways["pinned bf16"] = pageable.pin_memory().to
    for name, to in ways.items():
        n_bytes = pageable.nbytes * (2 if "fp32" in name else 1)
        copy = partial(to, context.device, copy=True, non_blocking=True)
        seconds = seconds_of(copy, context.device)
        yield measurement(
            f"batch to the device, {name}", seconds=seconds, bytes_per_second=n_bytes / seconds
        )


def _off_device(context: StageContext) -> Record:
    """Check and time a copy off the device in several pieces, as checkpoints do it."""
    rows, d_in = (64, 16) if context.is_dry else (65_537, 1024)
    tensor = torch.randn(rows, d_in, device=context.device)
    wrong = int((copied_to_cpu(tensor) != tensor.cpu()).sum())
    seconds = seconds_of(lambda: copied_to_cpu(tensor), context.device)
    rate = tensor.nbytes / seconds
    return comparison("copy for a checkpoint", wrong, 0, bytes_per_second=rate)
