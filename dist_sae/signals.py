"""Handling of SIGTERM and Ctrl-C; imports almost nothing, so that it takes effect first."""

import atexit
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
    """Turn both signals into KeyboardInterrupt; during an import, end the process.

    There is nothing to save during an import, and a library that is interrupted there may raise
    another error, or none.
    """
    for number in SIGNALS:
        signal.signal(number, _interrupt)


def stop_event() -> "threading.Event":
    """Event that both signals set from now on, for programs that save before they end."""
    import threading  # only after the handlers are installed

    stopping = threading.Event()
    for number in SIGNALS:
        signal.signal(number, lambda *_: stopping.set())
    return stopping


def heed_no_more(code: int) -> None:
    """Let a signal end the process at once with this exit code, now that the work is done."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: os._exit(code))
    # Python gives signals back to the system while it ends, and a signal would end it with 143
    atexit.register(ignore)


def ignore() -> None:
    """Ignore both signals, which holds until the process has ended."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _interrupt(_: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(sys.stderr.fileno(), INTERRUPTED.encode())
            os._exit(EXIT_RESUMABLE)
        frame = frame.f_back
    raise KeyboardInterrupt
