"""What a process holds."""

import sys
from collections.abc import Mapping
from typing import Any

import psutil

_PROCESS = psutil.Process()


def resident_bytes() -> int:
    """Memory of the host that this process holds now."""
    return int(_PROCESS.memory_info().rss)


def device_bytes(device: Any) -> Mapping[str, int]:
    """Memory of a GPU that this process holds, by state. Waits for no kernel.

    Args:
        device: The GPU; None is the first one that it sees, if it uses any. Threads have a current
            device of their own, so what the work is done on has to be named.
    """
    torch = sys.modules.get("torch")  # a program that has not loaded it has no GPU in use
    if torch is None or not torch.cuda.is_initialized():
        return {}
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "total": torch.cuda.get_device_properties(device).total_memory,
    }
