"""`--local-ranks N`: the ranks of one pod (or node), as child processes that end together.

torchrun does this too, but answers every failure with exit code 1, so that Kubernetes could not
tell a preemption (75) from a mistake (2).
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

from dist_sae.errors import EXIT_DONE, EXIT_RESUMABLE, EXIT_USER, ConfigError

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_FAILED_GRACE_SECONDS = 30.0  # for the others when one has failed: they may wait for it
_NODE_RANK = "JOB_COMPLETION_INDEX"


def rank_environments(n_local: int, world: int) -> list[dict[str, str]]:
    """For each rank of this pod: as whom it meets the others, and where, if all are in this pod.

    Args:
        n_local: Ranks of this pod, and of every other.
        world: Ranks of the job.

    Raises:
        ConfigError: Pods of so many ranks cannot hold the job, or Kubernetes has not said which pod
            of several this is.
    """
    if world % n_local:
        raise ConfigError(f"--local-ranks {n_local}: does not divide the {world} ranks of the job")
    node, place = 0, {}
    if world == n_local:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    else:
        if _NODE_RANK not in os.environ:
            raise ConfigError(
                f"{_NODE_RANK}: not set, though {world} ranks are on {world // n_local} nodes; "
                f"an Indexed Job sets it, elsewhere set it to the node's number"
            )
        node = int(os.environ[_NODE_RANK])
    return [
        {
            "RANK": str(node * n_local + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(world),
        }
        | place
        for local_rank in range(n_local)
    ]


def run_ranks(
    arguments: Sequence[str], environments: Sequence[Mapping[str, str]], stopping: threading.Event
) -> int:
    """Run the ranks of this pod until all have ended; when one ends, the others are told to.

    Args:
        arguments: Of `dist-sae`, for every rank; `--port-offset` is added.
        environments: Of each rank.
        stopping: When set, all are told to save and stop.

    Returns:
        The exit code: of a mistake (2) if one made it, else of the first that crashed, else 75 if
        one stopped.
    """
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "dist_sae", *arguments, "--port-offset", str(1 + local_rank)],
            env={**os.environ, **environment},
            start_new_session=True,  # signals reach this process alone, which passes them on
        )
        for local_rank, environment in enumerate(environments)
    ]
    try:
        first = _watch(ranks, stopping)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return _exit_code([rank.returncode for rank in ranks], first)


def _watch(ranks: list[subprocess.Popen[bytes]], stopping: threading.Event) -> int | None:
    """Until all have ended, or time is up for those that wait for one that has crashed.

    Returns:
        The exit code of the first that crashed, if any did.
    """
    told, first, deadline = False, None, float("inf")
    while True:
        codes = [rank.poll() for rank in ranks]
        # a rank that is told before it has learnt to heed it dies of it, with nothing to save
        fine = (None, EXIT_DONE, EXIT_RESUMABLE, *([-signal.SIGTERM] if told else []))
        crashed = [code for code in codes if code not in fine]
        if crashed and first is None:
            first = crashed[0]
            deadline = time.monotonic() + _FAILED_GRACE_SECONDS
        if None not in codes or time.monotonic() > deadline:
            return first
        if not told and (crashed or EXIT_RESUMABLE in codes or stopping.is_set()):
            told = True
            for rank in ranks:
                rank.send_signal(signal.SIGTERM)  # does nothing to what has ended
        time.sleep(_POLL_SECONDS)


def _exit_code(codes: list[int], first: int | None) -> int:
    if EXIT_USER in codes:
        return EXIT_USER
    if first is not None:
        if first < 0:
            name = signal.Signals(-first).name
            logger.error("a rank was killed by %s (out of memory, if SIGKILL)", name)
            return 128 - first
        return first
    return EXIT_RESUMABLE if any(codes) else EXIT_DONE


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
