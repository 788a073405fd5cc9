"""Helpers of the benchmarks: pairs of timings, peak memory, a temporary location in a store."""

import shutil
import statistics
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from dist_sae.config.data import S3Config
from dist_sae.storage import ObjectStore, open_store
from dist_sae.storage.local import LocalStore
from dist_sae.telemetry.process import resident_bytes


def compare(pairs: Sequence[tuple[float, float]], name: str = "ratio") -> dict[str, float]:
    """Return the median and quartiles of first / second over pairs that were timed in turn.

    Args:
        pairs: Seconds of the first and of the second.
        name: Key of the median. The keys of the quartiles add `_low` and `_high`.
    """
    ratios = sorted(one / other for one, other in pairs)
    quarter = len(ratios) // 4
    return {
        name: statistics.median(ratios),
        f"{name}_low": ratios[quarter],
        f"{name}_high": ratios[-1 - quarter],
    }


def medians(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the median of the first elements of the pairs, and of the second elements."""
    first, second = zip(*pairs, strict=True)
    return statistics.median(first), statistics.median(second)


@contextmanager
def peak_memory(measured: Callable[[], int] = resident_bytes) -> Iterator[list[int]]:
    """Track the peak memory of this process inside the `with`, sampled every millisecond."""
    peak, over = [measured()], threading.Event()

    def watch() -> None:
        while not over.wait(0.001):
            peak[0] = max(peak[0], measured())

    thread = threading.Thread(target=watch, name="memory", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


@contextmanager
def peak_device_memory(device: torch.device) -> Iterator[list[int]]:
    """Track the peak memory inside the `with`: allocated GPU memory, or else `peak_memory`.

    On a GPU, the yielded list is updated only when the block exits.
    """
    if device.type != "cuda":
        with peak_memory() as peak:
            yield peak
        return
    torch.cuda.reset_peak_memory_stats(device)
    peak = [0]
    yield peak
    peak[0] = torch.cuda.max_memory_allocated(device)


def used_bytes(device: torch.device) -> int:
    """Return the bytes of memory in use: allocated GPU memory, or else resident memory."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()


@contextmanager
def scratch(url: str, s3: S3Config) -> Iterator[ObjectStore]:
    """Open a new location under `url`, and delete all of it on exit, even after an error."""
    store = open_store(f"{url}/bench-{uuid.uuid4().hex[:12]}", s3)
    try:
        yield store
    finally:
        store.delete_many(list(store.keys()))
        if isinstance(store, LocalStore):
            shutil.rmtree(store.root, ignore_errors=True)
