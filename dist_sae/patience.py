"""Patience with a server: retries with jitter, until it answers or a deadline passes."""

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from dist_sae.errors import DistSaeError

Result = TypeVar("Result")

FIRST_PAUSE_SECONDS = 0.2
"""Pause after the first failure; it doubles."""
LONGEST_PAUSE_SECONDS = 10.0
"""Limit of the pause between attempts."""
_SAY_EVERY_SECONDS = 30.0
LAST_PATIENCE_SECONDS = 15.0
"""Longest retry once the program has been asked to stop."""


class Patience:
    """Retries calls until they succeed or the deadline passes.

    Args:
        seconds: From a call's first attempt to its deadline.
        stopping: Once set, calls retry for a few seconds only.
        passing: Kind of error that a later attempt may be spared.
        logger: Of the module that calls.
    """

    def __init__(
        self,
        seconds: float,
        stopping: threading.Event,
        passing: type[DistSaeError],
        logger: logging.Logger,
    ) -> None:
        self._seconds = seconds
        self._stopping = stopping
        self._passing = passing
        self._logger = logger

    def __call__(
        self, attempt: Callable[[], Result], on_failure: Callable[[DistSaeError], float]
    ) -> Result:
        """Attempt until it succeeds.

        Args:
            attempt: Raises an error of the passing kind if it may be tried again.
            on_failure: Is told of each such error before the deadline; returns the least pause
                before the next attempt, in seconds.

        Raises:
            DistSaeError: Of the passing kind: no attempt succeeded before the deadline.
        """
        since = said = time.monotonic()
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                return attempt()
            except self._passing as exc:
                now = time.monotonic()
                patience = self._seconds
                if self._stopping.is_set():
                    patience = min(patience, LAST_PATIENCE_SECONDS)
                if now - since >= patience:
                    raise
                if said == since or now - said > _SAY_EVERY_SECONDS:
                    said = now
                    self._logger.warning(
                        "%s; asking again for up to %.0f s", exc, patience - (now - since)
                    )
                least = on_failure(exc)
            rest = since + patience - time.monotonic()
            length = max(random.uniform(pause / 2, pause), least)
            self._pause(min(length, max(rest, 0.0)))
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _pause(self, seconds: float) -> None:
        if not self._stopping.is_set():
            self._stopping.wait(seconds)
        else:
            time.sleep(seconds)
