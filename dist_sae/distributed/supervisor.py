"""Child processes that start and end together: those of `dist-sae run`, and the ranks of a pod.

When one fails or stops, or a stop is requested, all others get SIGTERM. Children that are still
running after their grace time are killed.
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
"""Time between two checks of the children."""
_PARENT_HOLDS_STDIN = "DIST_SAE_PARENT_HOLDS_STDIN"


class End(NamedTuple):
    """The end of a child process."""

    child: int
    """Number of the child."""
    code: int
    """Exit code; -n if signal n killed it."""
    stop_requested: bool
    """Whether the child had been sent SIGTERM before it ended."""

    @property
    def failed(self) -> bool:
        """True if the child neither finished nor stopped as requested.

        SIGTERM kills a child that has not installed its handler yet. That is not a failure, because
        the child had nothing to save.
        """
        fine = (EXIT_DONE, EXIT_RESUMABLE, *([-signal.SIGTERM] if self.stop_requested else []))
        return self.code not in fine


def start(
    command: Sequence[str], environment: Mapping[str, str], **options: Any
) -> "subprocess.Popen[Any]":
    """Start a child in its own session, so that Ctrl-C reaches only the parent, which forwards it.

    Args:
        command: The program and its arguments. `dist-sae` ends when its parent dies
            (`follow_parent`).
        environment: Environment variables to add to this process's.
        options: Options of `subprocess.Popen`, such as where the child's output goes.
    """
    return subprocess.Popen(
        command,
        env={**os.environ, **environment, _PARENT_HOLDS_STDIN: "1"},
        stdin=subprocess.PIPE,
        start_new_session=True,
        **options,
    )


def follow_parent() -> None:
    """Treat the death of this process's parent like a SIGTERM. Called in children."""
    if os.environ.pop(_PARENT_HOLDS_STDIN, None):
        threading.Thread(target=_await_parent, name="parent", daemon=True).start()


def _await_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # returns when the parent dies; sys.stdin would take a lock
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
        starts: Functions that each start a child.
        stopping: When set, all children get SIGTERM.
        failed_grace_seconds: How long the others may run on after one has failed. They may hang
            without it.
        stop_grace_seconds: How long they may take to save and exit in other cases.

    Returns:
        How each child ended, in the order in which they ended.
    """
    children: list[subprocess.Popen[Any]] = []
    ends: dict[int, End] = {}
    stop_requested, deadline = False, float("inf")

    def collect() -> None:
        for index, child in enumerate(children):
            if index not in ends and (code := child.poll()) is not None:
                ends[index] = End(index, code, stop_requested)

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
                if not stop_requested:
                    stop_requested = True
                    for child in children:
                        child.send_signal(signal.SIGTERM)  # does nothing if it has ended
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
