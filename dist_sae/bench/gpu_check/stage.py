"""Helpers of the stages: device and folder, result records, timing, comparison."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

Record = dict[str, Any]
"""A result: `check`, the name; `ok`, whether the check passed; and numbers."""


class StageContext(NamedTuple):
    """The device and folder of a stage."""

    device: torch.device
    folder: Path
    """A temporary folder for this stage's files, deleted at the end."""

    @property
    def is_dry(self) -> bool:
        """True for the dry run on a CPU, with tiny shapes."""
        return self.device.type == "cpu"


def synchronise(device: torch.device) -> None:
    """Wait until a device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Return the median seconds of a call, including device work, after one untimed call."""
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
    """Return |value - expected| / |expected|, computed in fp64 on the CPU."""
    value, expected = value.detach().double().cpu(), expected.detach().double().cpu()
    return float((value - expected).norm() / expected.norm().clamp(min=1e-300))


def comparison(name: str, error: float, bound: float, **numbers: Any) -> Record:
    """Return the record of a comparison, which passes if error <= bound. NaN fails."""
    return {"check": name, "ok": bool(error <= bound), "error": error, "bound": bound, **numbers}


def measurement(name: str, **numbers: Any) -> Record:
    """Return the record of a measurement, which has no bound and always passes."""
    return {"check": name, "ok": True, **numbers}
