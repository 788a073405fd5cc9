"""What SIGTERM and Ctrl-C do while there is nothing to save yet; imports next to nothing."""

import os
import signal
import sys
from types import FrameType

from dist_sae.errors import EXIT_RESUMABLE

SIGNALS = (signal.SIGTERM, signal.SIGINT)
INTERRUPTED = "stopped: interrupted; start the same command again\n"


def heed() -> None:
    """Make both a KeyboardInterrupt, or in the midst of an import the end.

    An import has nothing to save, and a library that is interrupted in it may make another error of
    it, or none.
    """
    for number in SIGNALS:
        signal.signal(number, _interrupt)


def heed_no_more(code: int) -> None:
    """All is done: a signal that comes now makes the exit quicker, and nothing else."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: os._exit(code))


def _interrupt(_: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(sys.stderr.fileno(), INTERRUPTED.encode())
            os._exit(EXIT_RESUMABLE)
        frame = frame.f_back
    raise KeyboardInterrupt
