"""Runs a model that is split over several ranks: rank 0 leads, the others follow.

Rank 0 broadcasts each batch, all ranks run it, and rank 0 uses the result. The others wait for the
next batch without a timeout.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_sae.distributed.mesh import Mesh
from dist_sae.distributed.watch import Watch
from dist_sae.errors import Stopped

Work = Callable[[Tensor, Tensor], Any]
"""Called with (tokens, mask), the same on every rank."""

_OPEN, _RUN, _STOP, _END = range(4)


class Leader:
    """The side of rank 0, which broadcasts batches.

    Args:
        open_work: Builds the function that runs a batch. Collective.
        mesh: The ranks.
        watch: Notified when this rank starts and ends work on a batch.
    """

    def __init__(self, open_work: Callable[[], Work], mesh: Mesh, watch: Watch) -> None:
        self._mesh = mesh
        self._watch = watch
        self._batches = 0
        _broadcast(mesh, _OPEN)
        self._work = open_work()

    def run(self, tokens: Tensor, mask: Tensor) -> Any:
        """Run a batch on all ranks and return this rank's result."""
        _broadcast(self._mesh, _RUN, *tokens.shape)
        for tensor in (tokens.int(), mask.byte()):
            dist.broadcast(tensor.contiguous(), 0, self._mesh.control)
        self._batches += 1
        self._watch.set_step(self._batches, working=True)
        result = self._work(tokens, mask)
        _wait_for_device(self._mesh)
        self._watch.set_step(self._batches, working=False)
        return result


@contextmanager
def leading(mesh: Mesh) -> Iterator[None]:
    """End or stop the followers when the `with` block exits. After a failure, the watch does so."""
    try:
        yield
    except Stopped:
        _broadcast(mesh, _STOP)
        raise
    _broadcast(mesh, _END)


def follow(open_work: Callable[[], Work], mesh: Mesh, watch: Watch) -> None:
    """Run batches on a rank other than 0, until rank 0 ends.

    Raises:
        Stopped: Rank 0 was asked to stop.
    """
    work: Work | None = None
    batches = 0
    while True:
        what, rows, length = _broadcast(mesh)
        if what == _STOP:
            raise Stopped("stopped because rank 0 stopped; start again to continue")
        if what == _END:
            return
        if what == _OPEN:
            work = open_work()
            continue
        tokens = torch.empty(rows, length, dtype=torch.int32)
        mask = torch.empty(rows, length, dtype=torch.uint8)
        for tensor in (tokens, mask):
            dist.broadcast(tensor, 0, mesh.control)
        batches += 1
        watch.set_step(batches, working=True)
        assert work is not None
        work(tokens, mask.bool())
        _wait_for_device(mesh)
        watch.set_step(batches, working=False)


def _wait_for_device(mesh: Mesh) -> None:
    """Wait for the device's queue, because a rank that hangs there must not look idle."""
    if mesh.device.type == "cuda":
        torch.cuda.current_stream(mesh.device).synchronize()


def _broadcast(mesh: Mesh, what: int = 0, rows: int = 0, length: int = 0) -> list[int]:
    """Broadcast rank 0's command and the shape of its batch. Other ranks call it without them."""
    command = torch.tensor([what, rows, length])
    dist.broadcast(command, 0, mesh.control)
    return command.tolist()
