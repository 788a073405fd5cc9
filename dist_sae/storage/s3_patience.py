"""Patience with an endpoint.

Boto retries a request a few times. Longer faults (an endpoint that is down for minutes, a
connection that breaks in the middle of a body) are retried here, with jitter, for
`store.s3.deadline_seconds`.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from botocore.exceptions import NoCredentialsError

from dist_sae.config.data import S3Config
from dist_sae.errors import UnavailableError
from dist_sae.storage.base import Meter
from dist_sae.storage.s3_errors import mapped

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

FIRST_PAUSE_SECONDS = 0.2
"""Pause after the first failure; it doubles."""
LONGEST_PAUSE_SECONDS = 10.0
"""Limit of the pause between attempts."""
_SAY_EVERY_SECONDS = 30.0
LAST_PATIENCE_SECONDS = 15.0
"""Longest retry once the program has been asked to stop."""


class Patience:
    """Retries calls until the endpoint answers or the deadline passes.

    Args:
        url: Of the store, for messages.
        config: Endpoint and deadline.
        meter: Receives the number of retries.
        stopping: Once set, calls retry for a few seconds only.
        renew: Called when no credentials were found, before the next attempt.
    """

    def __init__(
        self,
        url: str,
        config: S3Config,
        meter: Meter | None,
        stopping: threading.Event,
        renew: Callable[[], None],
    ) -> None:
        self._url = url
        self._config = config
        self._meter = meter
        self._stopping = stopping
        self._renew = renew

    def __call__(self, key: str | None, call: Callable[[], Result]) -> Result:
        """Call until it succeeds.

        Args:
            key: The object, for messages.
            call: A request. Its errors are mapped to those of `errors.py`.

        Raises:
            UnavailableError: The endpoint did not answer before the deadline.
            StoreError: Waiting does not mend it.
        """
        since = said = time.monotonic()
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                with mapped(self._url, key, self._config.endpoint_url):
                    return call()
            except UnavailableError as exc:
                if isinstance(exc.__cause__, NoCredentialsError):
                    self._renew()
                now = time.monotonic()
                patience = self._config.deadline_seconds
                if self._stopping.is_set():
                    patience = min(patience, LAST_PATIENCE_SECONDS)
                if now - since >= patience:
                    raise
                if said == since or now - said > _SAY_EVERY_SECONDS:
                    said = now
                    logger.warning(
                        "%s; asking again for up to %.0f s", exc, patience - (now - since)
                    )
                if self._meter:
                    self._meter.add("dist_sae_store_retries_total", 1)
            rest = since + patience - time.monotonic()
            self._pause(min(random.uniform(pause / 2, pause), max(rest, 0.0)))
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _pause(self, seconds: float) -> None:
        if not self._stopping.is_set():
            self._stopping.wait(seconds)
        else:
            time.sleep(seconds)
