"""Helpers for writing objects in parts: cutting bytes, and limiting the parts in flight."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parts(pieces: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Regroup pieces of bytes of any size into parts of `size` bytes; the last may be smaller."""
    held: list[memoryview] = []
    n_held = 0
    for piece in pieces:
        view = memoryview(piece)
        while n_held + len(view) >= size:
            cut = size - n_held
            yield b"".join([*held, view[:cut]])
            view, held, n_held = view[cut:], [], 0
        held.append(view)
        n_held += len(view)
    if n_held:
        yield b"".join(held)


def map_ahead(
    pool: Executor, call: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """Yield the results of a call on each item, in order, as `Executor.map` does.

    At most `ahead` + 1 items are in flight at a time, so that few are in memory. When the iteration
    ends, even by an error, no call is still running. Otherwise a part could arrive after its upload
    was aborted, and stay in the bucket.
    """
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(call, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        wait([future for future in pending if not future.cancel()])
