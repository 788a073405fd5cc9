"""Rendezvous: the ranks of a job find one another in a TCP store that all of them can reach.

Rank 0 opens a generation, a random name that prefixes all keys, because torchrun's store outlives
the job and may contain keys of earlier ones. A rank joins a generation only once. A rank that is
restarted alone waits for the next generation, and the others report it missing.
"""

import os
import resource
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from dist_sae.device import local_rank
from dist_sae.distributed.local_ranks import NODE
from dist_sae.errors import ConfigError, DistSaeError, RankLostError, Stopped

_CONNECT_SECONDS = 5.0  # per attempt: the store may not be open yet
_POLL_SECONDS = 0.2
_MARGIN_SECONDS = 5.0  # after the limit, for rank 0 to report which ranks are missing
_FROZEN_SECONDS = 30.0  # after the limit, for store calls that never return
_LAST_PORT = 65_535
_CONNECTIONS = 3  # of each rank to the store: for the rendezvous, the watch and process groups
_OTHER_FILES = 1024


class Ranks(NamedTuple):
    """The ranks of a job, and this rank's place among them."""

    rank: int
    """This rank's number."""
    world: int
    """Number of ranks."""
    local_rank: int
    hosts: tuple[str, ...]
    """Hosts by rank: the host's name, and for a pod also the name of its node."""
    generation: str = ""
    """Prefix of the job's keys in the store."""
    groups_here: int = 1
    """Number of groups that have ranks on this rank's host."""

    def group(self, n: int) -> "Ranks":
        """Return this rank's group of n neighboring ranks, as a separate job."""
        if n == self.world:
            return self
        first = self.rank // n * n
        here = {rank // n for rank, host in enumerate(self.hosts) if host == self.hosts[self.rank]}
        return Ranks(
            self.rank - first,
            n,
            self.local_rank,
            self.hosts[first : first + n],
            f"{self.generation}/group/{first}",
            len(here),
        )

    def connect(self) -> Any:
        """Open another connection to the store. A call that waits blocks its connection.

        Raises:
            RankLostError: The store does not answer.
        """
        try:
            return dist.PrefixStore(self.generation, _connect())  # type: ignore[attr-defined]
        except dist.DistError as exc:
            raise _gone(exc) from exc


@contextmanager
def rendezvous(
    expected_world: int,
    limit_seconds: float = 600.0,
    stopping: threading.Event | None = None,
    *,
    setting: str = "processes.trainers",
    name: str = "",
) -> Iterator[Ranks]:
    """Wait until all ranks of the job have joined.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Without them, the job is this
    single process.

    Args:
        expected_world: Number of ranks in the run file.
        limit_seconds: Ranks that have not joined after this time are missing.
        stopping: Ends the wait.
        setting: Key of the run file that gives the number of ranks, for messages.
        name: The job's name, which separates it from other jobs at the same address.

    Raises:
        ConfigError: WORLD_SIZE differs from the run file, or the address is missing or malformed.
        RankLostError: Ranks are missing.
        Stopped: `stopping` was set before all ranks had joined.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world != expected_world:
        raise ConfigError(
            f"{setting} is {expected_world}, but WORLD_SIZE is {world}; "
            f"start {expected_world} ranks, as `dist-sae run` does, or set {setting}"
        )
    if world == 1:
        yield Ranks(rank, world, local_rank(), (_here(),))
        return
    _address()  # raises a ConfigError here, not in the thread
    joining = _Joining(rank, world, name, limit_seconds)
    hosts = joining.wait(stopping or threading.Event())
    yield Ranks(rank, world, local_rank(), hosts, joining.generation)
    del joining  # kept alive until here, because on rank 0 it owns the store


class _Joining:
    """Joins the rendezvous in a thread, because calls to a store cannot be interrupted."""

    def __init__(self, rank: int, world: int, name: str, limit_seconds: float) -> None:
        self.generation = ""
        self._rank = rank
        self._world = world
        self._name = name
        self._limit_seconds = limit_seconds
        self._until = time.monotonic() + limit_seconds
        self._server: Any = None
        self._hosts: tuple[str, ...] = ()
        self._failure: DistSaeError | None = None
        self._thread = threading.Thread(target=self._run, name="rendezvous", daemon=True)
        self._given_up = threading.Event()

    def wait(self, stopping: threading.Event) -> tuple[str, ...]:
        """Wait until all ranks have joined, and return the hosts by rank."""
        self._thread.start()
        while self._thread.is_alive():
            if stopping.wait(_POLL_SECONDS):
                self._given_up.set()
                raise Stopped("stopped before all ranks had joined; start again to continue")
            if time.monotonic() > self._until + _FROZEN_SECONDS:
                self._given_up.set()
                raise _gone(TimeoutError("it does not respond"))
        if self._failure is not None:
            raise self._failure
        return self._hosts

    def _run(self) -> None:
        try:
            if self._rank == 0:
                self._open()
            else:
                self._join()
        except DistSaeError as exc:
            self._failure = exc
        except dist.DistError as exc:
            self._failure = _gone(exc)

    def _open(self) -> None:
        """Open a generation and wait for the other ranks. Runs on rank 0."""
        _allow_files(_OTHER_FILES + _CONNECTIONS * self._world)
        self._server = _serve()
        store, self.generation = _connect(), uuid.uuid4().hex
        store.set(f"{self.generation}/host/0", _here())
        store.set(f"generation/{self._name}", self.generation)
        keys = [f"{self.generation}/host/{rank}" for rank in range(self._world)]
        while not store.check(keys):
            if time.monotonic() > self._until:
                missing = [str(n) for n, key in enumerate(keys) if not store.check([key])]
                words = (
                    f"rank {', '.join(missing)}: did not join within {self._limit_seconds:.0f} s; "
                    f"find out why, and start again"
                )
                store.set(f"{self.generation}/missing", words)
                # give the others time to read it, because the store ends with this process
                time.sleep(5 * _POLL_SECONDS)
                raise RankLostError(words)
            if self._given_up.wait(_POLL_SECONDS):
                return
        self._hosts = tuple(host.decode() for host in store.multi_get(keys))
        store.set(f"{self.generation}/all", "\n".join(self._hosts))

    def _join(self) -> None:
        """Join the first generation that this rank has not joined yet. Runs on the other ranks."""
        store, generation, joined = self._reach(), "", False
        while not self._given_up.wait(_POLL_SECONDS):
            if store.check([f"generation/{self._name}"]):
                now = store.get(f"generation/{self._name}").decode()
                if now != generation:
                    generation = now
                    joined = store.add(f"{generation}/joined/{self._rank}", 1) == 1
                    if joined:
                        store.set(f"{generation}/host/{self._rank}", _here())
            if joined and store.check([f"{generation}/all"]):
                self._hosts = tuple(store.get(f"{generation}/all").decode().split("\n"))
                self.generation = generation
                return
            if joined and store.check([f"{generation}/missing"]):
                raise RankLostError(store.get(f"{generation}/missing").decode())
            if time.monotonic() > self._until + _MARGIN_SECONDS:
                raise RankLostError(
                    f"rank 0 did not open a rendezvous within {self._limit_seconds:.0f} s; "
                    f"find out why, and start all ranks again"
                )

    def _reach(self) -> Any:
        """Connect to the store, retrying until rank 0 has opened it."""
        while True:
            try:
                return _connect(_CONNECT_SECONDS)
            except dist.DistError as exc:
                if time.monotonic() > self._until or self._given_up.is_set():
                    address, port = _address()
                    raise RankLostError(
                        f"rank 0 is not reachable at MASTER_ADDR:MASTER_PORT {address}:{port} "
                        f"({_first_line(exc)}); find out why it is not running, or correct the "
                        f"address, and start again"
                    ) from exc


def _here() -> str:
    node, host = os.environ.get(NODE), socket.gethostname()
    return f"{host} on {node}" if node else host


def _allow_files(n: int) -> None:
    """Let this process open n files, if the system allows it. The usual limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = n if hard == resource.RLIM_INFINITY else min(n, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _serve() -> Any:
    """Open the store on rank 0, unless torchrun already runs one."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    address, port = _address()
    try:
        return dist.TCPStore(address, port, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    except dist.DistError as exc:
        if "EADDRINUSE" not in str(exc):  # such as when DNS does not resolve this address
            raise RankLostError(
                f"MASTER_ADDR:MASTER_PORT {address}:{port}: the store cannot be opened there "
                f"({_first_line(exc)}); check that the name resolves to rank 0, and start again"
            ) from exc
        raise ConfigError(
            f"MASTER_PORT {port}: cannot be opened ({_first_line(exc)}); choose a free one"
        ) from exc


def _connect(limit_seconds: float = 60.0) -> Any:
    address, port = _address()
    limit = timedelta(seconds=limit_seconds)
    store = dist.TCPStore(address, port, timeout=limit, wait_for_workers=False)  # type: ignore[attr-defined]
    return dist.PrefixStore("dist_sae", store)  # type: ignore[attr-defined]


def _gone(exc: BaseException) -> RankLostError:
    return RankLostError(
        f"lost the connection to rank 0, which hosts the ranks' store ({_first_line(exc)}); "
        f"start again"
    )


def _address() -> tuple[str, int]:
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdecimal() or not 0 < int(port) <= _LAST_PORT:
        raise ConfigError(
            f"MASTER_ADDR:MASTER_PORT {address}:{port}: not an address for the rendezvous; "
            f"give rank 0's address and a free port"
        )
    return address, int(port)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]
