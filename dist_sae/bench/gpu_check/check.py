"""Shared by the stages: device and folder, records of results, timing, comparison."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

Record = dict[str, Any]
"""A result: `check`, its name; `ok`, whether it held; and numbers."""


class Check(NamedTuple):
    """Where a stage runs."""

    device: torch.device
    folder: Path
    """A folder of its own, for files; deleted at the end."""

    @property
    def is_dry(self) -> bool:
        """True for the dry run on a CPU, with tiny shapes."""
        return self.device.type == "cpu"


def synchronise(device: torch.device) -> None:
    """Wait until a device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Median time of a call with its device's work, after one that is not timed."""
    work()
    times = []
    for _ in range(repeats):
        synchronise(device)
        since = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - since)
    return statistics.median(times)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """|value - expected| / |expected|, in fp64 on the CPU."""
    value, expected = value.detach().double().cpu(), expected.detach().double().cpu()
    return float((value - expected).norm() / expected.norm().clamp(min=1e-300))


def held(check: str, error: float, bound: float, **numbers: Any) -> Record:
    """The record of a comparison, which held if the error is within the bound (NaN is not)."""
    return {"check": check, "ok": bool(error <= bound), "error": error, "bound": bound, **numbers}


def measured(check: str, **numbers: Any) -> Record:
    """The record of a measurement, which has no bound."""
    return {"check": check, "ok": True, **numbers}
