"""Logging, which the command line sets up once, and progress reports."""

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

SUPERVISED = "DIST_SAE_SUPERVISED"
"""Environment variable that `dist-sae run` sets for its children: they print progress as JSON."""

logger = logging.getLogger(__name__)


def configure(*, rank: int = 0) -> None:
    """Log to stderr, on rank 0 at INFO and on other ranks at WARNING."""
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    for noisy in ("DeepSpeed", "deepspeed", "botocore", "boto3", "urllib3", "torch", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def is_supervised() -> bool:
    """Return True if `dist-sae run` started this process and reads its output."""
    return bool(os.environ.get(SUPERVISED))


def progress(role: str, done: float, total: float, **numbers: Any) -> None:
    """Report this process's progress. Mappings among the numbers are sent only to a supervisor."""
    if is_supervised():
        record = {"role": role, "done": done, "total": total, **numbers}
        sys.stdout.write(json.dumps(record) + "\n")
        sys.stdout.flush()
    else:
        shown = " ".join(
            f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
            for k, v in numbers.items()
            if v is not None and not isinstance(v, Mapping)
        )
        logger.info("%s %s/%s %s", role, f"{done:.0f}", f"{total:.0f}", shown)


class RateLimitedProgress:
    """Progress reports with a rate limit: one per second to a supervisor, one per 30 s to a log.

    Args:
        role: Part of the run, for example `produce`.
        enabled: False on ranks whose progress another rank reports.
    """

    def __init__(self, role: str, *, enabled: bool = True) -> None:
        self._role = role
        self._enabled = enabled
        self._interval = 1.0 if is_supervised() else 30.0
        self._reported = float("-inf")

    def take_turn(self) -> bool:
        """Return True if a report is due, and then count it as sent."""
        if time.monotonic() - self._reported < self._interval:
            return False
        self._reported = time.monotonic()
        return True

    def __call__(self, done: float, total: float, **numbers: Any) -> None:
        """Report progress if a report is due."""
        if self._enabled and self.take_turn():
            progress(self._role, done, total, **numbers)

    def end(self, total: float) -> None:
        """Report that all work is done."""
        if self._enabled:
            progress(self._role, total, total)
