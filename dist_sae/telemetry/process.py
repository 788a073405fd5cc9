"""What a process holds."""

import sys
from collections.abc import Mapping

import psutil

_PROCESS = psutil.Process()


def resident_bytes() -> int:
    """Memory of the host that this process holds now."""
    return int(_PROCESS.memory_info().rss)


def device_bytes() -> Mapping[str, int]:
    """Memory of this process's GPU, by state; empty where none is in use. Waits for no kernel."""
    torch = sys.modules.get("torch")  # a program that has not loaded it has no GPU in use
    if torch is None or not torch.cuda.is_initialized():
        return {}
    return {
        "allocated": torch.cuda.memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
        "total": torch.cuda.get_device_properties().total_memory,
    }
