"""Simulated time, and a store whose requests take only simulated time.

The simulation runs the real code in a single thread (a discrete-event simulation). Each process has
its own time, which its requests advance, and runs without interruption until its next pause. Then
the process with the earliest time resumes. The store hides objects that were written later than the
time of the process that reads.
"""

import heapq
import math
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dist_sae.errors import ObjectNotFoundError
from dist_sae.storage import Entry, ObjectStore
from dist_sae.storage.keys import PAGE, NumberedKeys

_REQUEST_SECONDS = {"put": 0.03, "get": 0.03, "delete": 0.03, "list": 0.05}
_NAME, _SUFFIX = -len("00000000.json"), -len(".json")  # of a numbered key

Result = TypeVar("Result")
Process = Generator[float, None, Result]
"""A simulated process: a generator that yields the seconds for which it pauses."""


class Clock:
    """Runs processes in simulated time."""

    def __init__(self) -> None:
        self.now = 0.0
        """Time of the running process, in seconds since the start."""

    def run(self, processes: Iterable[Process[None]], over: Callable[[], bool]) -> None:
        """Run processes until all have ended, or until `over` returns True."""
        due = [(self.now, number, process) for number, process in enumerate(processes)]
        while due:
            self.now, number, process = due[0]
            if over():
                break
            pause = next(process, None)
            if pause is None:
                heapq.heappop(due)
            else:
                heapq.heapreplace(due, (self.now + pause, number, process))


class Pause(Exception):  # noqa: N818 - no error
    """Raised to leave a call that would wait."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class NeverSet(threading.Event):
    """An event that is never set. Waiting for it raises `Pause`."""

    def wait(self, timeout: float | None = None) -> bool:
        raise Pause(timeout or 0.0)


class Pipe:
    """A link with one transfer at a time. With infinite bandwidth, transfers take no time."""

    def __init__(self, clock: Clock, bytes_per_second: float) -> None:
        self._clock = clock
        self._bytes_per_second = bytes_per_second
        self._free = 0.0

    def book(self, size: float) -> float:
        """Add a transfer to the queue, and return the time when it ends."""
        self._free = max(self._clock.now, self._free) + size / self._bytes_per_second
        return self._free


class TimedKeys(NumberedKeys):
    """Numbered keys for which a simulated store keeps only the times of writing, no content.

    Args:
        keys: The real keys.
        n: Number of keys.
    """

    def __init__(self, keys: NumberedKeys, n: int) -> None:
        super().__init__(keys.folder)
        self.written = np.full(n, np.inf)

    def numbers(self, store: ObjectStore, page: int | None = None) -> Iterator[int]:
        return iter(self._listed(store, page)[0].tolist())

    def ages(self, store: ObjectStore, page: int | None = None) -> dict[int, float]:
        there, seconds = self._listed(store, page)
        return dict(zip(there.tolist(), seconds.tolist(), strict=True))

    def _listed(
        self, store: ObjectStore, page: int | None
    ) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """Return the numbers of the existing objects, and the objects' ages in seconds."""
        assert isinstance(store, SimulatedStore)
        first, last = (0, len(self.written)) if page is None else (page * PAGE, page * PAGE + PAGE)
        seconds = store.listed() - self.written[first:last]
        there = np.flatnonzero(seconds >= 0)
        return there + first, seconds[there]


class SimulatedStore:
    """A store in memory. Its requests are counted and take simulated time.

    Args:
        clock: The simulated time.
        times: Keys whose objects' contents do not matter.
        slowdown: Factor on the time of every request.
    """

    url = "simulated"
    exclusive = True

    def __init__(self, clock: Clock, times: Iterable[TimedKeys], slowdown: float = 1.0) -> None:
        self._clock = clock
        self._slowdown = slowdown
        self._times = {keys.folder: keys for keys in times}
        self._others: dict[str, tuple[bytes, float]] = {}
        self.requests: Counter[str] = Counter()

    def holds(self, key: str) -> bool:
        """Return whether an object exists, without a request."""
        return self._find(key)[1] <= self._clock.now

    def listed(self) -> float:
        """Count a request for a page of a listing, and return the time when it was sent."""
        now = self._clock.now
        self._ask("list")
        return now

    def get(self, key: str, *_: object) -> bytes:
        self._ask("get")
        if not self.holds(key):
            raise ObjectNotFoundError("no such object", url=self.url, key=key)
        return self._find(key)[0]

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        self._ask("put")
        if if_absent and self._find(key)[1] < math.inf:
            return False
        self._write(key, data, self._clock.now)
        return True

    def size(self, key: str) -> int | None:
        self._ask("get")
        return len(self._find(key)[0]) if self.holds(key) else None

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        now = self.listed()
        for key, (data, written) in list(self._others.items()):
            if key.startswith(prefix) and written <= now:
                yield Entry(key, len(data), now - written)

    def keys(self, prefix: str = "") -> Iterator[str]:
        keys = self._times[prefix]
        return map(keys.key, keys.numbers(self))

    def delete(self, key: str) -> None:
        self._ask("delete")
        self._write(key, b"", math.inf)

    def put_stream(self, key: str, content: Callable[[], Iterable[bytes]]) -> None:
        raise NotImplementedError

    def folders(self, prefix: str) -> list[str]:
        raise NotImplementedError

    def delete_many(self, keys: Sequence[str]) -> None:
        raise NotImplementedError

    def _find(self, key: str) -> tuple[bytes, float]:
        """Return an object's content and time of writing; infinite if it does not exist."""
        folder, number = key[:_NAME], key[_NAME:_SUFFIX]
        if keys := self._times.get(folder):
            return b"{}", float(keys.written[int(number)])
        return self._others.get(key, (b"", math.inf))

    def _write(self, key: str, data: bytes, second: float) -> None:
        folder, number = key[:_NAME], key[_NAME:_SUFFIX]
        if keys := self._times.get(folder):
            keys.written[int(number)] = second
        else:
            self._others[key] = data, second

    def _ask(self, request: str) -> None:
        self.requests[request] += 1
        self._clock.now += _REQUEST_SECONDS[request] * self._slowdown
