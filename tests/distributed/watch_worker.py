"""One rank of a job that only runs collectives, under a watch.

Rank 1 fails, hangs, waits or stops at step 3. Each rank prints its steps.
"""

import os
import signal
import threading
import time
from datetime import timedelta

import torch
from torch.distributed import distributed_c10d

from dist_sae.distributed import watch as watch_module
from dist_sae.distributed.mesh import Mesh, join_mesh
from dist_sae.distributed.rendezvous import rendezvous
from dist_sae.distributed.watch import Watch
from dist_sae.errors import CorruptObjectError, DistSaeError, Stopped
from dist_sae.signals import stop_event

MISSING_SECONDS, LOST_SECONDS, HUNG_SECONDS = 3.0, 2.0, 6.0
COMING_SECONDS = 60.0
"""Time limit of the rendezvous if no rank is missing: enough for a busy machine."""
GROUP_SECONDS = 1.0
"""Torch's timeout of a process group: less than `hung_seconds`, as on GPUs (10 min and 15 min)."""
NCCL_JUDGES = ("ASYNC_ERROR_HANDLING", "ENABLE_MONITORING")


def work(what: str) -> None:
    stopping = stop_event()
    os.write(1, b"\nready\n")
    patience = MISSING_SECONDS if what == "misses" else COMING_SECONDS
    with (
        rendezvous(3, patience, stopping) as ranks,
        Watch(ranks, stopping, lost_seconds=LOST_SECONDS, hung_seconds=HUNG_SECONDS) as watch,
    ):
        judges = {name: os.environ.get(f"TORCH_NCCL_{name}") for name in NCCL_JUDGES}
        os.write(1, f"\n{judges}\n".encode())
        if what == "dies first" and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        with join_mesh(ranks) as mesh:
            go(what, mesh, watch, stopping)


def go(what: str, mesh: Mesh, watch: Watch, stopping: threading.Event) -> None:
    for step in range(10_000):
        watch.set_step(step, working=False)
        if what == "waits" and mesh.rank == 1 and step == 3:
            time.sleep(2 * HUNG_SECONDS)  # as if it waited for data
        if mesh.any_rank(stopping.is_set()):
            raise Stopped(f"stopped at step {step}")
        watch.set_step(step, working=True)
        if mesh.rank == 1 and step == 3:
            if what in ("hangs", "hangs in a group"):
                time.sleep(3600)
            elif what == "fails":
                raise CorruptObjectError("is damaged", url="s3://bucket", key="unit")
            elif what == "stops":
                stopping.set()
        exchange = mesh.axis.sum_replicas if what == "hangs in a group" else mesh.axis.total
        exchange(torch.ones(1))
        os.write(1, f"{step}\n".encode())
        if what == "waits" and step == 10:
            return
        time.sleep(0.02)


def rank(what: str, output: str, env: dict[str, str]) -> None:
    """Run the process. Its stdout and stderr go to `output`.out and `output`.err."""
    os.environ.update(env)
    for number, ending in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{ending}", os.O_WRONLY | os.O_CREAT, 0o600), number)
    torch.set_num_threads(1)
    watch_module.GRACE_SECONDS = 1.0
    distributed_c10d.default_pg_timeout = timedelta(seconds=GROUP_SECONDS)
    try:
        work(what)
    except DistSaeError as error:
        os.write(2, f"error: {error}\n".encode())
        os._exit(error.exit_code)
