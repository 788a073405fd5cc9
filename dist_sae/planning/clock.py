"""Simulated time: threads that take turns, and a store whose requests take no real time.

The code that runs in it is the real one, which sleeps by an event or asks for the time by a
function that it is given.
"""

import heapq
import itertools
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from dist_sae.errors import ObjectNotFoundError
from dist_sae.storage import Entry
from dist_sae.storage.own import PAGE

_REQUEST_SECONDS = {"put": 0.03, "get": 0.03, "delete": 0.03, "list": 0.05}
_PAGE_DIGITS = len("000.json")
_STACK_BYTES = 2**20


class Clock:
    """Threads that take turns: one runs until it sleeps, then the next one that is due."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, threading.Lock]] = []
        self._numbers = itertools.count()
        self._own = threading.local()
        self._over = threading.Event()
        self._failed = list[BaseException]()

    def time(self) -> float:
        """Seconds since the beginning."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let the others run for so long."""
        self._enter(self.now + seconds, self._own.turn)
        self._pass_on()
        self._own.turn.acquire()

    def run(self, works: Iterable[Callable[[], None]]) -> None:
        """Run these at once until all have ended; raises what one of them raises."""
        stack = threading.stack_size(_STACK_BYTES)
        try:
            for work in works:
                turn = threading.Lock()
                turn.acquire()
                self._enter(self.now, turn)
                threading.Thread(target=self._work, args=(work, turn), daemon=True).start()
        finally:
            threading.stack_size(stack)
        self._pass_on()
        self._over.wait()
        if self._failed:
            raise self._failed[0]

    def _work(self, work: Callable[[], None], turn: threading.Lock) -> None:
        self._own.turn = turn
        turn.acquire()
        try:
            work()
        except BaseException as exc:  # raised by the caller's thread
            self._failed.append(exc)
        self._pass_on()

    def _enter(self, due: float, turn: threading.Lock) -> None:
        heapq.heappush(self._due, (due, next(self._numbers), turn))

    def _pass_on(self) -> None:
        if not self._due or self._failed:
            self._over.set()
            return
        self.now, _, turn = heapq.heappop(self._due)
        turn.release()


class Pipe:
    """Transfers that share a bandwidth, one after the other; an infinite one takes no time."""

    def __init__(self, clock: Clock, bytes_per_second: float) -> None:
        self._clock = clock
        self._bytes_per_second = bytes_per_second
        self._free = 0.0

    def book(self, size: float) -> float:
        """Begin a transfer; returns the second when it ends."""
        self._free = max(self._clock.now, self._free) + size / self._bytes_per_second
        return self._free


class SimulatedStore:
    """Objects in memory; each request takes its time, and is counted.

    Args:
        slowdown: Factor on the time of every request.
    """

    url = "simulated"
    exclusive = True

    def __init__(self, clock: Clock, slowdown: float = 1.0) -> None:
        self._clock = clock
        self._slowdown = slowdown
        self._pages: dict[str, dict[str, tuple[bytes, float]]] = {}
        self.requests: Counter[str] = Counter()

    def holds(self, key: str) -> bool:
        """Tell whether an object exists, without a request."""
        return key in self._page(key)

    def get(self, key: str, *_: object) -> bytes:
        self._ask("get")
        if key not in self._page(key):
            raise ObjectNotFoundError("no such object", url=self.url, key=key)
        return self._page(key)[key][0]

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        self._ask("put")
        if if_absent and key in self._page(key):
            return False
        self._page(key)[key] = data, self._clock.now
        return True

    def size(self, key: str) -> int | None:
        self._ask("get")
        found = self._page(key).get(key)
        return found and len(found[0])

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        for page in self._list(prefix):
            for key, (data, written) in page.items():
                yield Entry(key, len(data), self._clock.now - written)

    def keys(self, prefix: str = "") -> Iterator[str]:
        return itertools.chain.from_iterable(self._list(prefix))

    def delete(self, key: str) -> None:
        self._ask("delete")
        self._page(key).pop(key, None)

    def put_stream(self, key: str, content: Callable[[], Iterable[bytes]]) -> None:
        raise NotImplementedError

    def folders(self, prefix: str) -> list[str]:
        raise NotImplementedError

    def delete_many(self, keys: Sequence[str]) -> None:
        raise NotImplementedError

    def _page(self, key: str) -> dict[str, tuple[bytes, float]]:
        return self._pages.setdefault(key[:-_PAGE_DIGITS], {})

    def _list(self, prefix: str) -> list[dict[str, tuple[bytes, float]]]:
        found = [page for name, page in self._pages.items() if name.startswith(prefix)]
        for _ in range(max(1, -(-sum(map(len, found)) // PAGE))):
            self._ask("list")
        return found  # a queue needs no order

    def _ask(self, request: str) -> None:
        self.requests[request] += 1
        self._clock.sleep(_REQUEST_SECONDS[request] * self._slowdown)


class Horizon(threading.Event):
    """Set when the time is over, or when somebody sets it; waiting moves the clock."""

    def __init__(self, clock: Clock, seconds: float = math.inf) -> None:
        super().__init__()
        self._clock = clock
        self.seconds = seconds

    def is_set(self) -> bool:
        return self._clock.now >= self.seconds

    def set(self) -> None:
        self.seconds = min(self.seconds, self._clock.now)

    def wait(self, timeout: float | None = None) -> bool:
        self._clock.sleep(timeout or 0.0)
        return self.is_set()
