"""Logging, set up once by the command line, and progress reports."""

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
    """Log to stderr; rank 0 at INFO, the others at WARNING."""
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
    """True if `dist-sae run` started this process and reads its output."""
    return bool(os.environ.get(SUPERVISED))


def progress(role: str, done: float, total: float, **numbers: Any) -> None:
    """Report this process's progress; numbers that are mappings go to a supervisor only."""
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


class PacedProgress:
    """Rate-limited progress: a report per second to a supervisor, per 30 s to a log.

    Args:
        role: Part of the run, for example `produce`.
        speaks: False on ranks that do what another one reports.
    """

    def __init__(self, role: str, *, speaks: bool = True) -> None:
        self._role = role
        self._speaks = speaks
        self._pause = 1.0 if is_supervised() else 30.0
        self._said = float("-inf")

    def is_due(self) -> bool:
        """Tell whether a report is due; if so, it counts as made."""
        if time.monotonic() - self._said < self._pause:
            return False
        self._said = time.monotonic()
        return True

    def __call__(self, done: float, total: float, **numbers: Any) -> None:
        """Report progress if a report is due."""
        if self._speaks and self.is_due():
            progress(self._role, done, total, **numbers)

    def end(self, total: float) -> None:
        """Report that all is done."""
        if self._speaks:
            progress(self._role, total, total)
