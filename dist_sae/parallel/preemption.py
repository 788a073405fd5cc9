"""Stopping together: a signal to any rank becomes one decision of all."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from dist_sae.parallel.mesh import Mesh

_KEY = "dist_sae/stop"
_POLL_SECONDS = 0.5


@contextmanager
def shared(mesh: Mesh, stopping: threading.Event) -> Iterator[None]:
    """Let `stopping`, set on one rank, be set on all within a second, whatever they are doing.

    A rank that waits for data takes part in no collective, so it cannot be asked by one.
    """
    if mesh.world == 1:
        yield
        return
    over = threading.Event()
    thread = threading.Thread(
        target=_pass_on, args=(stopping, over), name="preemption", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _pass_on(stopping: threading.Event, over: threading.Event) -> None:
    store = dist.distributed_c10d._get_default_store()  # noqa: SLF001 - it has no public name
    try:
        while not over.wait(_POLL_SECONDS):
            if stopping.is_set():
                store.set(_KEY, "1")
                return
            if store.check([_KEY]):
                stopping.set()
                return
    except dist.DistError:
        stopping.set()  # the first rank, which keeps the store, is gone: no use in waiting for data
