"""Saving while training goes on."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from dist_sae.checkpoint.layout import Checkpoints, Piece
from dist_sae.checkpoint.state import TrainingState
from dist_sae.errors import Stopped

logger = logging.getLogger(__name__)

Some = TypeVar("Some")


class Saved(NamedTuple):
    """A checkpoint that is durable."""

    step: int
    cursors: Mapping[int, Any]
    """Of all streams."""
    bytes: int
    seconds: float
    """From the copy to the manifest."""


class Saver:
    """Copies this rank's part between two steps, and stores the copy in a thread.

    At most one save is under way; the next one waits for it. The checkpoint exists once every
    rank's part does: the ranks tell each other, and the first one writes the manifest.

    Args:
        checkpoints: Where to.
        state: What.
        scalars: What is no tensor and never changes.
        everyones: Gathers a value of every rank, in their order; called in the thread.
        first: Whether this rank writes the manifest.
        before: Called in the thread, on the first rank, before a checkpoint exists: what would
            be lost if the run died right after.
        durable: Called in the thread, on every rank, when a checkpoint exists.
        step: The step that the run begins at, which needs no saving.
        beside: Whether a copy is stored in a thread; else `save` returns when all is durable.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        state: TrainingState,
        scalars: Mapping[str, Any],
        *,
        everyones: Callable[[Any], list[Any]],
        first: bool,
        before: Callable[[], None],
        durable: Callable[[Saved], None],
        step: int,
        beside: bool = True,
    ) -> None:
        self._checkpoints = checkpoints
        self._state = state
        self._scalars = scalars
        self._everyones = everyones
        self._first = first
        self._before = before
        self._durable = durable
        self._step = step
        self._beside = beside
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.finish()
        except Exception as exc:
            if kind is None:
                raise
            logger.error("the last save failed as well: %s", exc)

    def save(self, step: int, cursors: Mapping[int, Any], **scalars: Any) -> None:
        """Begin to save; collective. Returns as soon as the copy is made, if beside.

        Args:
            step: Steps done.
            cursors: Where this rank's streams are.
            scalars: Of this moment, the same on all ranks.

        Raises:
            StoreError: The save before failed.
            Stopped: It failed on another rank.
        """
        self.finish()
        if step == self._step:
            return
        self._step = step
        since = time.monotonic()
        scalars |= self._state.scalars()
        if not self._beside:
            self._store(step, self._state.pieces(), cursors, scalars, since)
            return
        copies = [
            piece._replace(rows=piece.rows.to("cpu", copy=True)) for piece in self._state.pieces()
        ]

        def store() -> None:
            try:
                self._store(step, _consumed(copies), cursors, scalars, since)
            except BaseException as exc:  # the training's thread raises it
                self._error = exc

        # no daemon: what is on its way is finished when the program ends otherwise
        self._thread = threading.Thread(target=store, name="saver")
        self._thread.start()

    @property
    def saving(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> None:
        """Wait until the last save is durable.

        Raises:
            StoreError: It failed.
            Stopped: It failed on another rank.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _store(
        self,
        step: int,
        pieces: Iterable[Piece],
        cursors: Mapping[int, Any],
        scalars: Mapping[str, Any],
        since: float,
    ) -> None:
        """This rank's part, then the manifest of all ranks' parts."""
        everyones = self._together(lambda: (self._checkpoints.write(step, pieces), cursors))
        everywhere = {v: place for _, own in everyones for v, place in own.items()}

        def commit() -> int:
            if not self._first:
                return 0
            self._before()
            records = [records for records, _ in everyones]
            all_scalars = {**self._scalars, **scalars, "places": everywhere}
            return self._checkpoints.commit(step, records, all_scalars)

        size = max(self._together(commit))
        self._durable(Saved(step, everywhere, size, time.monotonic() - since))

    def _together(self, work: Callable[[], Some]) -> list[Some]:
        """What each rank's `work` returned; raises on all of them when one failed."""
        value, failure = None, None
        try:
            value = work()
        except BaseException as exc:  # raised below: the others must hear of it first
            failure = exc
        everyones = self._everyones((value, None if failure is None else str(failure)))
        if failure is not None:
            raise failure
        if said := [words for _, words in everyones if words is not None]:
            raise Stopped(f"another rank could not save: {said[0]}")
        return [value for value, _ in everyones]


def _consumed(copies: list[Piece]) -> Iterator[Piece]:
    """One after the other; none is held any longer than it takes."""
    copies.reverse()
    while copies:
        yield copies.pop()
