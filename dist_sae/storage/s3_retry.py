"""Retries of calls to an S3 endpoint.

Boto retries a request a few times. Longer faults (an endpoint that is down for minutes) and faults
that boto does not retry (a connection that breaks within a body) are retried here, for
`store.s3.deadline_seconds`.
"""

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from botocore.exceptions import NoCredentialsError

from dist_sae.config.data import S3Config
from dist_sae.errors import DistSaeError, UnavailableError
from dist_sae.retry import Retrier
from dist_sae.storage.base import Meter
from dist_sae.storage.s3_errors import mapped

Result = TypeVar("Result")


class S3Retrier:
    """Retries calls until the endpoint responds or the deadline passes.

    Args:
        url: URL of the store, for messages.
        config: Settings of the endpoint, including the deadline.
        meter: Receiver of the number of retries.
        stopping: Event after which calls retry for only a few seconds.
        renew: Function that is called before the next attempt if no credentials were found.
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
        self._renew = renew
        logger = logging.getLogger(__name__)
        self._retry = Retrier(config.deadline_seconds, stopping, UnavailableError, logger)

    def __call__(self, key: str | None, call: Callable[[], Result]) -> Result:
        """Repeat a call until it succeeds, and return its result.

        Args:
            key: Key of the object, for messages.
            call: Function that sends a request. Its errors are mapped to those of `errors.py`.

        Raises:
            UnavailableError: The endpoint did not respond before the deadline.
            StoreError: The call failed with an error that a retry cannot fix.
        """

        def attempt() -> Result:
            with mapped(self._url, key, self._config.endpoint_url):
                return call()

        return self._retry(attempt, self._on_failure)

    def _on_failure(self, exc: DistSaeError) -> float:
        if isinstance(exc.__cause__, NoCredentialsError):
            self._renew()
        if self._meter:
            self._meter.add("dist_sae_store_retries_total", 1)
        return 0.0
