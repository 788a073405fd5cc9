"""Objects that are written in parts: cutting their bytes, and a bounded number in flight."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parts(pieces: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Cut bytes that come in pieces of any size into parts of `size`; the last may be smaller."""
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

    Only `ahead` items are taken before their results are asked for, so that few are in memory.
    However it ends, no call still runs then: a part that arrives after its upload was aborted would
    stay in the bucket.
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
