"""How the ranks of a job find one another: a store that all reach, before anything is shared."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from dist_sae.errors import ConfigError, RankLostError, Stopped

_TRY_SECONDS = 5.0  # to reach a store that may not be there yet
_LOOK_SECONDS = 0.2
_ANSWER_SECONDS = 60.0


class Ranks(NamedTuple):
    """Who takes part in a job."""

    rank: int
    """This one."""
    world: int
    local_rank: int
    hosts: tuple[str, ...]
    """Where the ranks are, by rank."""

    def connect(self) -> Any:
        """A connection of its own to the store: another may be in use by a thread that waits."""
        return _connect(_ANSWER_SECONDS)


@contextmanager
def meet(
    expected_world: int,
    limit_seconds: float = 600.0,
    stopping: threading.Event | None = None,
    *,
    setting: str = "processes.trainers",
) -> Iterator[Ranks]:
    """Wait for all ranks, as RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT say.

    Without these variables the job is this one process.

    Args:
        expected_world: Ranks that the run file names.
        limit_seconds: Whoever has not come by then is missing.
        stopping: Ends the waiting.
        setting: Where the run file names them.

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
    host = socket.gethostname()
    if world == 1:
        yield Ranks(rank, world, local_rank, (host,))
        return
    server = _serve() if rank == 0 else None  # as long as this name lasts
    store = _reach(time.monotonic() + limit_seconds, stopping or threading.Event())
    store.set(f"host/{rank}", host)
    _wait_for_all(store, rank, world, limit_seconds, stopping or threading.Event())
    hosts = store.multi_get([f"host/{other}" for other in range(world)])
    yield Ranks(rank, world, local_rank, tuple(host.decode() for host in hosts))
    del server


def _serve() -> Any:
    """The store itself; torchrun has one already."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    address, port = _place()
    try:
        return dist.TCPStore(address, port, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    except dist.DistError as exc:
        raise ConfigError(
            f"MASTER_PORT {port}: cannot be opened ({_first_line(exc)}); choose a free one"
        ) from exc


def _connect(limit_seconds: float) -> Any:
    address, port = _place()
    limit = timedelta(seconds=limit_seconds)
    store = dist.TCPStore(address, port, timeout=limit, wait_for_workers=False)  # type: ignore[attr-defined]
    # torchrun's outlives the ranks: each start has its own words there
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"dist_sae/{attempt}", store)  # type: ignore[attr-defined]


def _reach(until: float, stopping: threading.Event) -> Any:
    """A connection to the store, as soon as rank 0 has opened it."""
    while True:
        try:
            return _connect(_TRY_SECONDS)
        except dist.DistError as exc:
            _heed(stopping)
            if time.monotonic() > until:
                place = ":".join(map(str, _place()))
                raise RankLostError(
                    f"rank 0 is not at MASTER_ADDR:MASTER_PORT {place} ({_first_line(exc)}); "
                    f"see why it does not run, or correct the address, and start again"
                ) from exc


def _wait_for_all(
    store: Any, rank: int, world: int, limit_seconds: float, stopping: threading.Event
) -> None:
    """The first rank, which the others lose the store with, says when it has been too long."""
    until = time.monotonic() + limit_seconds
    try:
        while missing := [one for one in range(world) if not store.check([f"host/{one}"])]:
            _heed(stopping)
            if rank and store.check(["missing"]):
                raise RankLostError(store.get("missing").decode())
            if not rank and time.monotonic() > until:
                words = (
                    f"rank {', '.join(map(str, missing))}: not here after {limit_seconds:.0f} s; "
                    f"see why it does not run, and start again"
                )
                store.set("missing", words)
                time.sleep(3 * _LOOK_SECONDS)  # let the others hear
                raise RankLostError(words)
            stopping.wait(_LOOK_SECONDS)
    except dist.DistError as exc:
        raise RankLostError(
            f"rank 0, which keeps the store, has ended before all had come ({_first_line(exc)}); "
            f"start again"
        ) from exc


def _heed(stopping: threading.Event) -> None:
    if stopping.is_set():
        raise Stopped("stopped before all ranks had come; start again to go on")


def _place() -> tuple[str, int]:
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdecimal():
        raise ConfigError(
            f"MASTER_ADDR:MASTER_PORT {address}:{port}: the ranks cannot meet there; "
            f"give rank 0's address and a free port"
        )
    return address, int(port)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]
