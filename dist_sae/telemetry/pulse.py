"""Whether a process lives and works, as the probes of its pod ask.

/livez     503 while a piece of work takes longer than it may: the pod is to be replaced
/readyz    503 before the first piece of work
"""

import time

PATHS = ("/livez", "/readyz")


class Pulse:
    """What the process says of its own work. Written by one thread, read by others."""

    def __init__(self) -> None:
        self._begun = False
        self._until = float("inf")

    def work(self, seconds: float) -> None:
        """A piece of work begins; without another word after so many seconds it is hung."""
        self._until = time.monotonic() + seconds
        self._begun = True

    def rest(self) -> None:
        """The work is done; waiting for more may take as long as it takes."""
        self._until = float("inf")
        self._begun = True

    def fault(self, path: str) -> str | None:
        """Why the answer to a probe is no; None if it is yes."""
        if path == "/readyz":
            return None if self._begun else "has not begun to work"
        late = time.monotonic() - self._until
        return f"hung: should have been done {late:.0f} s ago" if late > 0 else None
