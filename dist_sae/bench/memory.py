"""How much memory this process holds."""

import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def resident_bytes() -> int:
    """What it holds now."""
    with Path("/proc/self/statm").open(encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """The largest resident memory while this lasts, looked at every few milliseconds."""
    peak, over = [resident_bytes()], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            peak[0] = max(peak[0], resident_bytes())

    thread = threading.Thread(target=watch, name="memory", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()
