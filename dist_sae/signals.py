"""Handling of SIGTERM and Ctrl-C; imports almost nothing, so that it takes effect first."""

import atexit
import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING

from dist_sae.errors import EXIT_RESUMABLE

if TYPE_CHECKING:
    import threading

SIGNALS = (signal.SIGTERM, signal.SIGINT)
INTERRUPTED = "stopped: interrupted; start the same command again\n"
_code: int | None = None


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
    global _code  # noqa: PLW0603 - what `_end` is to exit with
    _code = code
    for number in SIGNALS:
        signal.signal(number, lambda *_: os._exit(code))


def end_early() -> None:
    """Let the process end before Python takes itself apart, once `heed_no_more` has been called.

    Other threads are ended and other exit functions called as ever, if they are registered later:
    so this comes first. After them Python would give signals back to the system, so that one ends
    it with 143, and stop daemon threads within libraries, where C++ may abort (134).
    """
    atexit.register(_end)


def _end() -> None:
    if _code is not None:
        with suppress(OSError, ValueError):  # a reader that has gone
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(_code)


def _interrupt(_: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(sys.stderr.fileno(), INTERRUPTED.encode())
            os._exit(EXIT_RESUMABLE)
        frame = frame.f_back
    raise KeyboardInterrupt
