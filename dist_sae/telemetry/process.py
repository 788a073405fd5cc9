"""Memory of this process."""

import sys
from collections.abc import Mapping
from typing import Any

import psutil

_PROCESS = psutil.Process()


def resident_bytes() -> int:
    """Return the resident memory of this process, in bytes."""
    return int(_PROCESS.memory_info().rss)


def device_bytes(device: Any) -> Mapping[str, int]:
    """Return the GPU memory of this process in bytes, by state. Does not wait for the device.

    Args:
        device: The GPU in use; None for the first visible one. The caller must name it, because
            each thread has its own current device.
    """
    torch = sys.modules.get("torch")  # a program that has not imported it uses no GPU
    if torch is None or not torch.cuda.is_initialized():
        return {}
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "total": torch.cuda.get_device_properties(device).total_memory,
    }
