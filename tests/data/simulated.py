"""Many workers on one queue, in simulated time: real queues, a store that only answers slowly."""

import heapq
import itertools
import random
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace

import pytest

import dist_sae.data.work_queue
from dist_sae.data.shard import CLAIMS, MANIFESTS
from dist_sae.data.work_queue import LEASE_SECONDS, Work, Worker, WorkQueue
from dist_sae.errors import ObjectNotFoundError
from dist_sae.storage import Entry
from dist_sae.storage.own import PAGE

PUT_SECONDS = GET_SECONDS = 0.03
LIST_SECONDS = 0.05
_PAGE_DIGITS = len("000.json")


class Clock:
    """Threads that take turns: one runs until it sleeps, then the next one that is due."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, threading.Lock]] = []
        self._numbers = itertools.count()
        self._own = threading.local()
        self._over = threading.Event()
        self._failed = list[BaseException]()

    def sleep(self, seconds: float) -> None:
        self._enter(self.now + seconds, self._own.turn)
        self._pass_on()
        self._own.turn.acquire()

    def run(self, works: Iterable[Callable[[], None]]) -> None:
        """Run these at once until all have ended."""
        stack = threading.stack_size(2**20)
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
        except BaseException as exc:  # raised by the test's thread
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


class Store:
    """Objects in memory; each request takes its time, and is counted."""

    url = "simulated"
    exclusive = True

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._pages: dict[str, dict[str, tuple[bytes, float]]] = {}
        self.requests: Counter[str] = Counter()

    def get(self, key: str, *_: object) -> bytes:
        self._ask("get", GET_SECONDS)
        if key not in self._page(key):
            raise ObjectNotFoundError("no such object", url=self.url, key=key)
        return self._page(key)[key][0]

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        self._ask("put", PUT_SECONDS)
        if if_absent and key in self._page(key):
            return False
        self._page(key)[key] = data, self._clock.now
        return True

    def put_stream(self, key: str, content: Callable[[], Iterable[bytes]]) -> None:
        raise NotImplementedError

    def size(self, key: str) -> int | None:
        self._ask("get", GET_SECONDS)
        found = self._page(key).get(key)
        return found and len(found[0])

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        found = self._find(prefix)
        self._ask_for_list(len(found))
        for key, (data, written) in found:
            yield Entry(key, len(data), self._clock.now - written)

    def keys(self, prefix: str = "") -> Iterator[str]:
        found = [key for key, _ in self._find(prefix)]
        self._ask_for_list(len(found))
        yield from found

    def folders(self, prefix: str) -> list[str]:
        raise NotImplementedError

    def delete(self, key: str) -> None:
        self._ask("delete", PUT_SECONDS)
        self._page(key).pop(key, None)

    def delete_many(self, keys: Sequence[str]) -> None:
        raise NotImplementedError

    def _page(self, key: str) -> dict[str, tuple[bytes, float]]:
        return self._pages.setdefault(key[:-_PAGE_DIGITS], {})

    def _find(self, prefix: str) -> list[tuple[str, tuple[bytes, float]]]:
        pages = [page for name, page in self._pages.items() if name.startswith(prefix)]
        return [item for page in pages for item in page.items()]  # a queue needs no order

    def _ask_for_list(self, n: int) -> None:
        for _ in range(max(1, -(-n // PAGE))):
            self._ask("list", LIST_SECONDS)

    def _ask(self, request: str, seconds: float) -> None:
        self.requests[request] += 1
        self._clock.sleep(seconds)


class Horizon(threading.Event):
    """Set when the time is over; waiting moves the clock."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        super().__init__()
        self._clock = clock
        self.seconds = seconds

    def is_set(self) -> bool:
        return self._clock.now >= self.seconds

    def wait(self, timeout: float | None = None) -> bool:
        self._clock.sleep(timeout or 0.0)
        return self.is_set()


class Fleet:
    """Producers of units that take a while each, for some time.

    As in `producing.loop`, the next unit is claimed, and the last one stored, while the model works
    on the present one.

    Args:
        unit_seconds: Time that the model needs for a unit, give or take a tenth. The producers
            start within that time.
        seconds: Length of the simulation.
        counted_from: Second from which requests and work are counted.
        limit: Given the clock and the store, the first unit that may not be begun yet.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        workers: int,
        units: int,
        unit_seconds: float,
        *,
        seconds: float,
        counted_from: float,
        limit: Callable[[Clock, Store], int] | None = None,
    ) -> None:
        self.clock = Clock()
        self.store = Store(self.clock)
        self.begun: Counter[int] = Counter()
        """How often each unit was begun."""
        self.busy_share = 0.0
        """Share of the producers' time in which they work."""
        self._workers = workers
        self._unit_seconds = unit_seconds
        self._horizon = Horizon(self.clock, seconds)
        self._counted_from = counted_from
        limits = (lambda: (limit(self.clock, self.store), "")) if limit else None
        items = array("q", range(units))  # shared by all queues
        self._work = Work("unit", items, CLAIMS, MANIFESTS, limits)
        times = SimpleNamespace(monotonic=lambda: self.clock.now)
        monkeypatch.setattr(dist_sae.data.work_queue, "time", times)
        producers = [partial(self._produce, number) for number in range(workers)]
        self.clock.run([*producers, self._begin_to_count])

    @property
    def units(self) -> float:
        """Units of work done."""
        return self.busy_share * self._workers * self.seconds / self._unit_seconds

    @property
    def seconds(self) -> float:
        return self._horizon.seconds - self._counted_from

    @property
    def requests(self) -> int:
        """Requests of the queues."""
        return sum(self.store.requests[kind] for kind in ("get", "put", "list", "delete"))

    def _begin_to_count(self) -> None:
        self.clock.sleep(self._counted_from)
        self.store.requests.clear()

    def _produce(self, number: int) -> None:
        chance = random.Random(number)
        self.clock.sleep(chance.uniform(0, self._unit_seconds))
        worker = Worker(f"p{number}", number, self._workers)
        queue = WorkQueue(self.store, self._work, worker, self._horizon)
        renews = self.clock.now + chance.uniform(0, LEASE_SECONDS / 3)
        last, unit = None, queue.take()
        while unit is not None and not self._horizon.is_set():
            began = self.clock.now
            self.begun[unit] += 1
            following = queue.take(wait=False)
            if last is not None:
                self._finish(queue, last)
            if self.clock.now > renews:
                renews += LEASE_SECONDS / 3
                queue.renew()
            ends = began + self._unit_seconds * chance.uniform(0.9, 1.1)
            self.clock.sleep(max(0.0, ends - self.clock.now))
            self._count_busy(began, ends)
            last = unit
            unit = following
            if unit is None:
                self._finish(queue, last)
                last, unit = None, queue.take()

    def _count_busy(self, began: float, ends: float) -> None:
        worked = min(ends, self._horizon.seconds) - max(began, self._counted_from)
        self.busy_share += max(0.0, worked) / (self._workers * self.seconds)

    def _finish(self, queue: WorkQueue, unit: int) -> None:
        self.store.put(MANIFESTS.key(unit), b"{}", if_absent=True)
        self.store.requests["put"] -= 1  # the work's own
        queue.release(unit, done=True)
