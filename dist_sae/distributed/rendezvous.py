"""How the ranks of a job find one another: a store that all reach, before anything is shared.

The first rank begins a life, a name under which all words of this meeting are kept: the store may
have had other meetings before, with torchrun, which keeps it. A rank comes once in a life; one that
is started again alone waits for the next, while the others miss it.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from dist_sae.errors import ConfigError, DistSaeError, RankLostError, Stopped

_TRY_SECONDS = 5.0  # to reach a store that may not be there yet
_LOOK_SECONDS = 0.2
_MARGIN_SECONDS = 5.0  # in which the first rank, which knows who is missing, says so
_FROZEN_SECONDS = 30.0  # beyond the limit, for calls that nothing answers
_LAST_PORT = 65_535


class Ranks(NamedTuple):
    """Who takes part in a job."""

    rank: int
    """This one."""
    world: int
    local_rank: int
    hosts: tuple[str, ...]
    """Where the ranks are, by rank."""
    life: str = ""

    def connect(self) -> Any:
        """A connection of its own to the store: another may be in use by a thread that waits.

        Raises:
            RankLostError: The store does not answer.
        """
        try:
            return dist.PrefixStore(self.life, _connect())  # type: ignore[attr-defined]
        except dist.DistError as exc:
            raise _gone(exc) from exc


@contextmanager
def meet(
    expected_world: int,
    limit_seconds: float = 600.0,
    stopping: threading.Event | None = None,
    *,
    setting: str = "processes.trainers",
    name: str = "",
) -> Iterator[Ranks]:
    """Wait for all ranks, as RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT say.

    Without these variables the job is this one process.

    Args:
        expected_world: Ranks that the run file names.
        limit_seconds: Whoever has not come by then is missing.
        stopping: Ends the waiting.
        setting: Where the run file names them.
        name: Of the job: others that come to the same address do not take part.

    Raises:
        ConfigError: The launcher started another number of ranks than the run file names, or told
            them no place to meet.
        RankLostError: Some have not come.
        Stopped: Before all had come.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", str(rank)))
    if world != expected_world:
        raise ConfigError(
            f"{setting} is {expected_world}, but WORLD_SIZE is {world}; "
            f"start {expected_world} ranks or set {setting}"
        )
    if world == 1:
        yield Ranks(rank, world, local_rank, (socket.gethostname(),))
        return
    _place()  # or it says what is wrong
    meeting = _Meeting(rank, world, name, limit_seconds)
    hosts = meeting.wait(stopping or threading.Event())
    yield Ranks(rank, world, local_rank, hosts, meeting.life)
    del meeting  # the first rank's keeps the store


class _Meeting:
    """One rank's way into the meeting: in a thread, because calls to a store cannot be stopped."""

    def __init__(self, rank: int, world: int, name: str, limit_seconds: float) -> None:
        self.life = ""
        self._rank = rank
        self._world = world
        self._name = name
        self._limit_seconds = limit_seconds
        self._until = time.monotonic() + limit_seconds
        self._server: Any = None
        self._hosts: tuple[str, ...] = ()
        self._failure: DistSaeError | None = None
        self._thread = threading.Thread(target=self._run, name="meeting", daemon=True)
        self._given_up = threading.Event()

    def wait(self, stopping: threading.Event) -> tuple[str, ...]:
        """The hosts, by rank, when all have come."""
        self._thread.start()
        while self._thread.is_alive():
            if stopping.wait(_LOOK_SECONDS):
                self._given_up.set()
                raise Stopped("stopped before all ranks had come; start again to go on")
            if time.monotonic() > self._until + _FROZEN_SECONDS:
                self._given_up.set()
                raise _gone(TimeoutError("it does not answer"))
        if self._failure is not None:
            raise self._failure
        return self._hosts

    def _run(self) -> None:
        try:
            if self._rank == 0:
                self._lead()
            else:
                self._come()
        except DistSaeError as exc:
            self._failure = exc
        except dist.DistError as exc:
            self._failure = _gone(exc)

    def _lead(self) -> None:
        """Begin a life, and see who comes."""
        self._server = _serve()
        store, self.life = _connect(), uuid.uuid4().hex
        store.set(f"{self.life}/host/0", socket.gethostname())
        store.set(f"life/{self._name}", self.life)
        keys = [f"{self.life}/host/{rank}" for rank in range(self._world)]
        while not store.check(keys):
            if time.monotonic() > self._until:
                missing = [str(n) for n, key in enumerate(keys) if not store.check([key])]
                words = (
                    f"rank {', '.join(missing)}: not here after {self._limit_seconds:.0f} s; "
                    f"see why it does not run, and start again"
                )
                store.set(f"{self.life}/missing", words)
                time.sleep(5 * _LOOK_SECONDS)  # let the others hear: the store ends with this rank
                raise RankLostError(words)
            if self._given_up.wait(_LOOK_SECONDS):
                return
        self._hosts = tuple(host.decode() for host in store.multi_get(keys))
        store.set(f"{self.life}/all", "\n".join(self._hosts))

    def _come(self) -> None:
        """Take part in the first life that this rank has not been in before."""
        store, life, here = self._reach(), "", False
        while not self._given_up.wait(_LOOK_SECONDS):
            if store.check([f"life/{self._name}"]):
                now = store.get(f"life/{self._name}").decode()
                if now != life:
                    life = now
                    here = store.add(f"{life}/came/{self._rank}", 1) == 1
                    if here:
                        store.set(f"{life}/host/{self._rank}", socket.gethostname())
            if here and store.check([f"{life}/all"]):
                self._hosts = tuple(store.get(f"{life}/all").decode().split("\n"))
                self.life = life
                return
            if here and store.check([f"{life}/missing"]):
                raise RankLostError(store.get(f"{life}/missing").decode())
            if time.monotonic() > self._until + _MARGIN_SECONDS:
                raise RankLostError(
                    f"rank 0 has not begun a meeting after {self._limit_seconds:.0f} s; "
                    f"see why, and start all ranks again"
                )

    def _reach(self) -> Any:
        """A connection to the store, as soon as rank 0 has opened it."""
        while True:
            try:
                return _connect(_TRY_SECONDS)
            except dist.DistError as exc:
                if time.monotonic() > self._until or self._given_up.is_set():
                    raise RankLostError(
                        f"rank 0 is not at MASTER_ADDR:MASTER_PORT {':'.join(map(str, _place()))} "
                        f"({_first_line(exc)}); see why it does not run, or correct the address, "
                        f"and start again"
                    ) from exc


def _serve() -> Any:
    """The store itself; torchrun has one already."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    address, port = _place()
    try:
        return dist.TCPStore(address, port, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    except dist.DistError as exc:
        if "EADDRINUSE" not in str(exc):  # it has not found itself, for example: DNS is away
            raise RankLostError(
                f"MASTER_ADDR:MASTER_PORT {address}:{port}: nobody can meet there "
                f"({_first_line(exc)}); see that the name leads to rank 0, and start again"
            ) from exc
        raise ConfigError(
            f"MASTER_PORT {port}: cannot be opened ({_first_line(exc)}); choose a free one"
        ) from exc


def _connect(limit_seconds: float = 60.0) -> Any:
    address, port = _place()
    limit = timedelta(seconds=limit_seconds)
    store = dist.TCPStore(address, port, timeout=limit, wait_for_workers=False)  # type: ignore[attr-defined]
    return dist.PrefixStore("dist_sae", store)  # type: ignore[attr-defined]


def _gone(exc: BaseException) -> RankLostError:
    return RankLostError(
        f"rank 0, which keeps the store that the ranks meet at, is gone ({_first_line(exc)}); "
        f"start again"
    )


def _place() -> tuple[str, int]:
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdecimal() or not 0 < int(port) <= _LAST_PORT:
        raise ConfigError(
            f"MASTER_ADDR:MASTER_PORT {address}:{port}: the ranks cannot meet there; "
            f"give rank 0's address and a free port"
        )
    return address, int(port)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]
