"""Liveness and readiness of a process, for the probes of its pod.

/livez     503 while a piece of work exceeds its time: the pod must be replaced
/readyz    503 before the first piece of work
"""

import time

PATHS = ("/livez", "/readyz")


class Pulse:
    """State of the process's work. Written by one thread, read by others."""

    def __init__(self) -> None:
        self._begun = False
        self._until = float("inf")

    def work(self, seconds: float) -> None:
        """A piece of work starts; after this many seconds without a call the process is hung."""
        self._until = time.monotonic() + seconds
        self._begun = True

    def rest(self) -> None:
        """The work is done; the wait for more has no limit."""
        self._until = float("inf")
        self._begun = True

    def fault(self, path: str) -> str | None:
        """Why a probe fails; None if it passes."""
        if path == "/readyz":
            return None if self._begun else "has not begun to work"
        late = time.monotonic() - self._until
        return f"hung: should have been done {late:.0f} s ago" if late > 0 else None
