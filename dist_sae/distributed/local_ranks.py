"""`--local-ranks N`: the ranks of one pod (or node) as child processes.

torchrun does this too, but it turns every failure into exit code 1, so Kubernetes could not tell a
preemption (75) from a user's mistake (2).
"""

import logging
import os
import random
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial

from dist_sae.distributed.supervisor import End, start, supervise
from dist_sae.errors import EXIT_DONE, EXIT_RESUMABLE, EXIT_USER, ConfigError

logger = logging.getLogger(__name__)

FAILED_GRACE_SECONDS = 30.0
"""Time for ranks to exit after one has failed. After a stop request, Kubernetes sets the limit."""
NODE = "DIST_SAE_NODE"
"""Environment variable with the name of the pod's node, for messages."""
_NODE_RANK = "JOB_COMPLETION_INDEX"
_PORTS = 20_000, 32_768


def rank_environments(n_local: int, world: int) -> list[dict[str, str]]:
    """Return the environment variables of each rank of this pod: its rank and the world size.

    They include the address of the rendezvous if this pod has all ranks.

    Args:
        n_local: Number of ranks in each pod.
        world: Number of ranks in the job.

    Raises:
        ConfigError: The job's ranks do not fill whole pods, or the number of this pod is unknown.
    """
    if world % n_local:
        raise ConfigError(
            f"--local-ranks {n_local}: does not divide the {world} ranks of the job; use a divisor"
        )
    node, place = 0, {}
    if world == n_local:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    else:
        if _NODE_RANK not in os.environ:
            raise ConfigError(
                f"{_NODE_RANK}: not set, although {world} ranks are on {world // n_local} nodes; "
                f"an Indexed Job sets it; elsewhere, set it to the node's number"
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
    """Run the ranks of this pod until all have ended.

    Args:
        arguments: Every rank's command line after `dist-sae`. `--port-offset` is added to it.
        environments: Environment variables of each rank.
        stopping: When set, all ranks get SIGTERM, so that they save and stop.

    Returns:
        The exit code of the pod: 2 if a rank exited with 2, else the code of the first rank that
        crashed, else 75 if a rank stopped, else 0.
    """
    command = [sys.executable, "-m", "dist_sae", *arguments, "--port-offset"]
    starts = [
        partial(start, [*command, str(1 + local_rank)], environment)
        for local_rank, environment in enumerate(environments)
    ]
    return _exit_code(supervise(starts, stopping, failed_grace_seconds=FAILED_GRACE_SECONDS))


def _exit_code(ends: Sequence[End]) -> int:
    if any(end.code == EXIT_USER for end in ends):
        return EXIT_USER
    crash = next((end for end in ends if end.failed), None)
    if crash is None:
        return EXIT_RESUMABLE if any(end.code for end in ends) else EXIT_DONE
    if crash.code > 0:
        return crash.code
    name = signal.Signals(-crash.code).name
    logger.error("local rank %d was killed by %s (SIGKILL: out of memory?)", crash.child, name)
    return 128 - crash.code


def _free_port() -> int:
    """Return a free port, which rank 0 opens some seconds later.

    The port is below the range for outgoing connections on Linux. Otherwise, one of these could
    take it in the meantime.
    """
    while True:
        port = random.SystemRandom().randrange(*_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
