"""Retries of calls to a server, with jitter, until a call succeeds or a deadline passes."""

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from dist_sae.errors import DistSaeError

Result = TypeVar("Result")

FIRST_PAUSE_SECONDS = 0.2
"""Pause after the first failure. It doubles with each further failure."""
LONGEST_PAUSE_SECONDS = 10.0
"""Maximum pause between attempts, unless the server asks for a longer one."""
_LOG_EVERY_SECONDS = 30.0
STOPPING_RETRY_SECONDS = 15.0
"""Maximum time for retries of a call once the program has been asked to stop."""


class Retrier:
    """Retries calls until they succeed or a deadline passes.

    Args:
        seconds: Time from a call's first attempt to its deadline.
        stopping: Event that shortens all retries to a few seconds once it is set.
        transient: Class of temporary errors, after which a later attempt may succeed.
        logger: Logger of the calling module.
    """

    def __init__(
        self,
        seconds: float,
        stopping: threading.Event,
        transient: type[DistSaeError],
        logger: logging.Logger,
    ) -> None:
        self._seconds = seconds
        self._stopping = stopping
        self._transient = transient
        self._logger = logger

    def __call__(
        self, attempt: Callable[[], Result], on_failure: Callable[[DistSaeError], float]
    ) -> Result:
        """Call `attempt` until it succeeds.

        Args:
            attempt: The call. It raises a temporary error if it may be tried again.
            on_failure: Called with each temporary error before the deadline. It returns the
                minimum pause before the next attempt, in seconds.

        Raises:
            DistSaeError: A temporary error: no attempt succeeded before the deadline.
        """
        since = logged = time.monotonic()
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                return attempt()
            except self._transient as exc:
                now = time.monotonic()
                limit = self._seconds
                if self._stopping.is_set():
                    limit = min(limit, STOPPING_RETRY_SECONDS)
                if now - since >= limit:
                    raise
                if logged == since or now - logged > _LOG_EVERY_SECONDS:
                    logged = now
                    self._logger.warning(
                        "%s; retrying for up to %.0f s", exc, limit - (now - since)
                    )
                least = on_failure(exc)
            rest = since + limit - time.monotonic()
            length = max(random.uniform(pause / 2, pause), least)
            self._pause(min(length, max(rest, 0.0)))
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _pause(self, seconds: float) -> None:
        if not self._stopping.is_set():
            self._stopping.wait(seconds)
        else:
            time.sleep(seconds)
