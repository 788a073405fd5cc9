"""Saving of checkpoints in the background while training continues."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from dist_sae.checkpoint.layout import Checkpoints, Piece, TensorRecord
from dist_sae.checkpoint.state import TrainingState
from dist_sae.device import copied_to_cpu
from dist_sae.errors import Stopped

logger = logging.getLogger(__name__)

Some = TypeVar("Some")


class Saved(NamedTuple):
    """A durable checkpoint."""

    step: int
    cursors: Mapping[int, tuple[int, ...]]
    """Positions of all streams."""
    bytes: int
    seconds: float
    """Time from the start of the copy until the manifest was written."""


def saver_thread() -> ThreadPoolExecutor:
    """Create the thread for saves. The process does not exit while a save is running."""
    return ThreadPoolExecutor(1, "saver")


@dataclass(kw_only=True, eq=False)
class Saver:
    """A saver that copies this rank's part between two steps and writes the copy in a thread.

    At most one save is in progress, and the next one waits for it. When every rank has written its
    part, rank 0 writes the manifest, and the checkpoint exists.

    The jobs of a sweep share the thread, so their saves run in the same order on every rank.
    """

    checkpoints: Checkpoints
    state: TrainingState
    """The live objects to save."""
    scalars: Mapping[str, Any]
    """Numbers and settings that are the same in every checkpoint of the run."""
    all_gather: Callable[[Any, Any], list[Any]]
    """Gathers a value from every rank, in rank order, given its type. Called in the thread."""
    writes_manifest: bool
    """Whether this rank writes the manifest."""
    before_commit: Callable[[], None]
    """Called in the thread on rank 0 before the manifest is written, to make other data that
    belongs to the checkpoint durable."""
    on_durable: Callable[[Saved], None]
    """Called in the thread on every rank as soon as the checkpoint exists."""
    last_step: int
    """The last step that was saved or is being saved. Initially the step that the run resumes."""
    background: bool = True
    """Whether `save` copies the state and writes it in the thread. If not, `save` blocks until the
    checkpoint is written."""
    thread: ThreadPoolExecutor = field(default_factory=saver_thread)
    """The thread that writes the copies; see `saver_thread`."""
    _pending: Future[None] | None = field(default=None, init=False)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            self.finish()
        except Exception as exc:
            if error is None:
                raise
            logger.error("the last checkpoint also failed to save: %s", exc)

    def save(self, step: int, cursors: Mapping[int, Any], **scalars: Any) -> None:
        """Start a save. In the background mode, return as soon as the state is copied. Collective.

        Args:
            step: Number of steps done.
            cursors: Positions of this rank's streams.
            scalars: Numbers to store with this checkpoint, the same on all ranks.

        Raises:
            StoreError: The previous save failed.
            Stopped: The previous save failed on another rank.
        """
        self.finish()
        if step == self.last_step:
            return
        self.last_step = step
        since = time.monotonic()
        scalars |= self.state.scalars()
        if not self.background:
            self.thread.submit(int).result()  # wait for the saves of other jobs, on every rank
            self._store(step, self.state.pieces(), cursors, scalars, since)
            return
        copies = [piece._replace(rows=copied_to_cpu(piece.rows)) for piece in self.state.pieces()]
        parts = _consumed(copies)
        self._pending = self.thread.submit(self._store, step, parts, cursors, scalars, since)

    @property
    def saving(self) -> bool:
        """Whether a save is in progress."""
        return self._pending is not None and not self._pending.done()

    def finish(self) -> None:
        """Wait until the last checkpoint is durable.

        Raises:
            StoreError: The save failed.
            Stopped: The save failed on another rank.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _store(
        self,
        step: int,
        pieces: Iterable[Piece],
        cursors: Mapping[int, Any],
        scalars: Mapping[str, Any],
        since: float,
    ) -> None:
        """Write this rank's part and then, on rank 0, the manifest of all parts. Collective."""
        parts = self._on_all_ranks(
            lambda: (self.checkpoints.write(step, pieces), cursors),
            tuple[dict[str, TensorRecord], dict[int, tuple[int, ...]]],
        )
        everywhere = {v: cursor for _, own in parts for v, cursor in own.items()}

        def commit() -> int:
            if not self.writes_manifest:
                return 0
            self.before_commit()
            records = [records for records, _ in parts]
            all_scalars = {**self.scalars, **scalars, "places": everywhere}
            return self.checkpoints.commit(step, records, all_scalars)

        size = max(self._on_all_ranks(commit, int))
        self.on_durable(Saved(step, everywhere, size, time.monotonic() - since))

    def _on_all_ranks(self, work: Callable[[], Some], kind: Any) -> list[Some]:
        """Call `work` on every rank and gather the results. Raise on all ranks if one rank fails.

        Args:
            work: Function to call.
            kind: Type of its result.
        """
        value, failure = None, None
        try:
            value = work()
        except BaseException as exc:  # raised below, after the other ranks know
            failure = exc
        results = self.all_gather(
            (value, None if failure is None else str(failure)), tuple[kind | None, str | None]
        )
        if failure is not None:
            raise failure
        if failures := [words for _, words in results if words is not None]:
            raise Stopped(f"another rank could not save: {failures[0]}")
        return [value for value, _ in results]


def _consumed(copies: list[Piece]) -> Iterator[Piece]:
    """Yield the copies in order, and drop the reference to each so that it is freed after use."""
    copies.reverse()
    while copies:
        yield copies.pop()
