"""One rank leads, the others do the same: how a model that several ranks hold is run.

Each batch goes from the first rank to the others, and all run it; what comes out is used on the
first. While it has none, the others wait, however long.
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
"""Of (tokens, mask): the same on every rank."""

_OPEN, _RUN, _STOP, _END = range(4)


class Leader:
    """The first rank's side.

    Args:
        open_work: Makes the work ready; collective.
        mesh: The ranks.
        watch: Is told when they are at work.
    """

    def __init__(self, open_work: Callable[[], Work], mesh: Mesh, watch: Watch) -> None:
        self._mesh = mesh
        self._watch = watch
        self._batches = 0
        _tell(mesh, _OPEN)
        self._work = open_work()

    def run(self, tokens: Tensor, mask: Tensor) -> Any:
        """Run a batch on all ranks; what comes out here."""
        _tell(self._mesh, _RUN, *tokens.shape)
        for tensor in (tokens.int(), mask.byte()):
            dist.broadcast(tensor.contiguous(), 0, self._mesh.control)
        self._batches += 1
        self._watch.at(self._batches, working=True)
        result = self._work(tokens, mask)
        _wait_for_device()
        self._watch.at(self._batches, working=False)
        return result


@contextmanager
def leading(mesh: Mesh) -> Iterator[None]:
    """Tell the others at the end of it that there is no more to come; a failure the watch tells."""
    try:
        yield
    except Stopped:
        _tell(mesh, _STOP)
        raise
    _tell(mesh, _END)


def follow(open_work: Callable[[], Work], mesh: Mesh, watch: Watch) -> None:
    """The other ranks' side, until the first one ends.

    Raises:
        Stopped: It ended because it was asked to stop.
    """
    work: Work | None = None
    batches = 0
    while True:
        what, rows, length = _tell(mesh)
        if what == _STOP:
            raise Stopped("stopped with the rank that leads; start again to go on")
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
        watch.at(batches, working=True)
        assert work is not None
        work(tokens, mask.bool())
        _wait_for_device()
        watch.at(batches, working=False)


def _wait_for_device() -> None:
    """Until the work is done and not only begun, or a rank that hangs would look idle."""
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()


def _tell(mesh: Mesh, what: int = 0, rows: int = 0, length: int = 0) -> list[int]:
    """What the first rank says; what the others say counts for nothing."""
    words = torch.tensor([what, rows, length])
    dist.broadcast(words, 0, mesh.control)
    return words.tolist()
