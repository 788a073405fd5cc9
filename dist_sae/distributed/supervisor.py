"""Child processes that begin and end together: those of `dist-sae run`, and the ranks of a pod.

When one fails or stops, or a stop is requested, the others are told to end (SIGTERM). Children that
are still running when their grace time is over are killed.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dist_sae.errors import EXIT_DONE, EXIT_RESUMABLE

POLL_SECONDS = 0.05
"""Time between two looks at the processes."""
_PARENT_HOLDS_STDIN = "DIST_SAE_PARENT_HOLDS_STDIN"


class End(NamedTuple):
    """The end of a child process."""

    child: int
    """Number of the child."""
    code: int
    """Exit code; -n if signal n killed it."""
    told: bool
    """Told to end before it did."""

    @property
    def failed(self) -> bool:
        """True if the child neither finished nor stopped as it was told.

        SIGTERM kills a child that has not installed its handler yet. It has nothing to save, so
        this is no failure.
        """
        fine = (EXIT_DONE, EXIT_RESUMABLE, *([-signal.SIGTERM] if self.told else []))
        return self.code not in fine


def start(
    command: Sequence[str], environment: Mapping[str, str], **options: Any
) -> "subprocess.Popen[Any]":
    """Start a child in a session of its own: Ctrl-C reaches the parent alone, which passes it on.

    Args:
        command: The program and its arguments. `dist-sae` ends when its parent is gone
            (`follow_parent`).
        environment: Added to this process's.
        options: For `subprocess.Popen`: who reads what the child prints.
    """
    return subprocess.Popen(
        command,
        env={**os.environ, **environment, _PARENT_HOLDS_STDIN: "1"},
        stdin=subprocess.PIPE,
        start_new_session=True,
        **options,
    )


def follow_parent() -> None:
    """In a child: treat the death of the parent like a SIGTERM."""
    if os.environ.pop(_PARENT_HOLDS_STDIN, None):
        threading.Thread(target=_await_parent, name="parent", daemon=True).start()


def _await_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # returns when the parent is gone; sys.stdin would take a lock
    os.kill(os.getpid(), signal.SIGTERM)


def supervise(
    starts: Sequence[Callable[[], "subprocess.Popen[Any]"]],
    stopping: threading.Event,
    *,
    failed_grace_seconds: float,
    stop_grace_seconds: float = float("inf"),
) -> list[End]:
    """Start children and watch them until all have ended.

    Args:
        starts: Each starts a child.
        stopping: When set, all are told to end.
        failed_grace_seconds: How long the others may take once one has failed: they may hang
            without it.
        stop_grace_seconds: How long they may take to save and end otherwise.

    Returns:
        How each ended, in the order of their ends.
    """
    children: list[subprocess.Popen[Any]] = []
    ends: dict[int, End] = {}
    told, deadline = False, float("inf")

    def collect() -> None:
        for index, child in enumerate(children):
            if index not in ends and (code := child.poll()) is not None:
                ends[index] = End(index, code, told)

    try:
        for begin in starts:
            children.append(begin())  # noqa: PERF401 - if one cannot start, the others must end
        while True:
            collect()
            failed = any(end.failed for end in ends.values())
            if len(ends) == len(children) or time.monotonic() > deadline:
                break
            stopped = any(end.code == EXIT_RESUMABLE for end in ends.values())
            if failed or stopped or stopping.is_set():
                if not told:
                    told = True
                    for child in children:
                        child.send_signal(signal.SIGTERM)  # does nothing to what has ended
                grace = failed_grace_seconds if failed else stop_grace_seconds
                deadline = min(deadline, time.monotonic() + grace)
            time.sleep(POLL_SECONDS)
    finally:
        for child in children:
            child.kill()
            child.wait()
            if child.stdin is not None:
                child.stdin.close()
    collect()
    return list(ends.values())
