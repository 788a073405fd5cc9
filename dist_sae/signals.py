"""What SIGTERM and Ctrl-C do. Imports next to nothing: it is in force before anything else is."""

import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING

from dist_sae.errors import EXIT_RESUMABLE

if TYPE_CHECKING:
    import threading

SIGNALS = (signal.SIGTERM, signal.SIGINT)
INTERRUPTED = "stopped: interrupted; start the same command again\n"


def heed() -> None:
    """Turn both into a KeyboardInterrupt; during an import they end the process.

    There is nothing to save then, and a library that is interrupted while it is imported may raise
    another error, or none.
    """
    for number in SIGNALS:
        signal.signal(number, _interrupt)


def stop_event() -> "threading.Event":
    """An event that both set from now on, for programs that save before they end."""
    import threading  # after signals are heeded

    stopping = threading.Event()
    for number in SIGNALS:
        signal.signal(number, lambda *_: stopping.set())
    return stopping


def heed_no_more(code: int) -> None:
    """The work is done: a signal now ends the process at once, with this exit code."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: os._exit(code))


def _interrupt(_: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(sys.stderr.fileno(), INTERRUPTED.encode())
            os._exit(EXIT_RESUMABLE)
        frame = frame.f_back
    raise KeyboardInterrupt
