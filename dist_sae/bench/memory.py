"""Peak memory of this process."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dist_sae.telemetry.process import resident_bytes


@contextmanager
def peak_memory(measured: Callable[[], int] = resident_bytes) -> Iterator[list[int]]:
    """Track the peak memory inside the `with`, sampled every millisecond."""
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
