"""Handling of SIGTERM and Ctrl-C. Imports almost nothing, so that the handlers are set early."""

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


def install_handlers() -> None:
    """Make both signals raise KeyboardInterrupt or, during an import, end the process.

    During an import there is nothing to save, and an interrupted library may raise a different
    error, or none.
    """
    for number in SIGNALS:
        signal.signal(number, _interrupt)


def stop_event() -> "threading.Event":
    """Return an event that both signals set from now on, for programs that save before exiting."""
    import threading  # only after the handlers are installed

    stopping = threading.Event()
    for number in SIGNALS:
        signal.signal(number, lambda *_: stopping.set())
    return stopping


def exit_on_signal(code: int) -> None:
    """Make signals end the process at once with this exit code. Called when the work is done."""
    global _code  # noqa: PLW0603 - what `_exit_early` is to exit with
    _code = code
    for number in SIGNALS:
        signal.signal(number, lambda *_: os._exit(code))


def register_early_exit() -> None:
    """Make Python exit before it finalizes the interpreter, once `exit_on_signal` has been called.

    Call this first: exit functions run in reverse order, so `_exit_early` then runs after all
    others. Without it Python would restore the default signal handlers, so that a late SIGTERM ends
    the process with 143. It would also stop daemon threads inside libraries, where C++ may abort
    (134).
    """
    atexit.register(_exit_early)


def _exit_early() -> None:
    if _code is not None:
        with suppress(OSError, ValueError):  # the reader has closed the pipe
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
