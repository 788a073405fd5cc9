"""Liveness and readiness of a process, for the probes of its pod.

/livez     503 while the current work exceeds its time limit, so that the pod is replaced
/readyz    503 before the first work starts
"""

import time

PATHS = ("/livez", "/readyz")


class Liveness:
    """Whether the process is busy, idle or hung. Written by one thread, read by others."""

    def __init__(self) -> None:
        self._started = False
        self._until = float("inf")

    def busy(self, seconds: float) -> None:
        """Record that work starts. After `seconds` without another call, the process is hung."""
        self._until = time.monotonic() + seconds
        self._started = True

    def idle(self) -> None:
        """Record that the work is done. Waiting for more work has no time limit."""
        self._until = float("inf")
        self._started = True

    def probe_failure(self, path: str) -> str | None:
        """Return why a probe fails; None if it passes."""
        if path == "/readyz":
            return None if self._started else "has not started working"
        late = time.monotonic() - self._until
        return f"hung: exceeded its time limit {late:.0f} s ago" if late > 0 else None
