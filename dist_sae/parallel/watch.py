"""Ranks that watch over one another: a stop is passed on, and a lost or hung rank ends the job.

Every rank leaves a sign of life in the rendezvous store twice a second. The first rank reads all of
them and says when one is missing; the others read what it says, and its sign. A rank that waits for
data or is inside a collective takes part in nothing else, so none of this needs the training's
thread: when the job must end and that thread does not come back by itself, the process is ended.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any, NamedTuple

import torch.distributed as dist

from dist_sae.errors import DistSaeError, RankLostError, Stopped
from dist_sae.parallel import axis
from dist_sae.parallel.mesh import Mesh

_BEAT_SECONDS = 0.5
_GRACE_SECONDS = 5.0  # for the training's thread to end by itself, with an error of its own
_STOP, _OVER, _SIGN = "dist_sae/stop", "dist_sae/over", "dist_sae/sign/"


class _Sign(NamedTuple):
    """What a rank says of itself."""

    beat: int
    step: int
    working: bool
    """Not waiting for data, for the store, or for others that may."""
    collectives: int
    """Entered so far: who is behind the others keeps them waiting."""
    left: bool
    error: str | None
    """Why it has left, if not as it should."""
    host: str


class _Seen(NamedTuple):
    """The last sign of a rank, and when it was new."""

    sign: _Sign
    alive: float
    moved: float
    """When it came to where it is."""


class Watch:
    """This rank's part of the watch, while in its `with`.

    Args:
        mesh: The ranks.
        stopping: Set on one rank, it is set on all within seconds.
        lost_seconds: A rank that gives no sign of life for so long is lost.
        hung_seconds: A rank that works on one step for so long is hung.
    """

    def __init__(
        self, mesh: Mesh, stopping: threading.Event, *, lost_seconds: float, hung_seconds: float
    ) -> None:
        self._mesh = mesh
        self._stopping = stopping
        self._lost_seconds = lost_seconds
        self._hung_seconds = hung_seconds
        self._beats = 0
        # each is written by one thread, whole: what the two wrote together could be lost
        self._at = (0, False)
        self._left: tuple[bool, str | None] = (False, None)
        self._ended = threading.Event()
        self._over = threading.Event()
        self._verdict = ""
        self._heard = time.monotonic()  # from the store
        self._threads = [
            threading.Thread(target=work, name=f"watch-{work.__name__}", daemon=True)
            for work in (self._beat, self._judge)
        ]

    def at(self, step: int, *, working: bool) -> None:
        """Say what the training is about."""
        self._at = (step, working)

    def __enter__(self) -> "Watch":
        if self._mesh.world > 1:
            self._store = _own_client(self._mesh.world, self._lost_seconds)
            self._say()
            self._mesh.barrier()  # every rank has a sign
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._mesh.world == 1:
            return
        if error is None:
            self._mesh.barrier()  # under watch: nobody is missed before all are done
        # which rank it is about, the watch will know soon
        elif _is_about_others(error) and self._over.wait(self._lost_seconds + _GRACE_SECONDS):
            self._leave(None)
            raise RankLostError(self._verdict) from error
        self._leave(None if error is None or isinstance(error, Stopped) else _first_line(error))

    def _leave(self, error: str | None) -> None:
        self._left = (True, error)
        self._ended.set()
        for thread in self._threads:
            thread.join(_GRACE_SECONDS)
        if self._mesh.is_first and (error or self._verdict):
            time.sleep(3 * _BEAT_SECONDS)  # the store ends with this process: let the others hear

    def _beat(self) -> None:
        """Give signs of life, and hear what is said."""
        try:
            seen: dict[int, _Seen] = {}
            while not self._ended.wait(_BEAT_SECONDS):
                self._say()
                self._pass_on_a_stop()
                self._hear(seen)
                self._heard = time.monotonic()
            self._say()  # that it has left
        except dist.DistError as exc:
            if not self._ended.is_set():
                self._end(f"rank 0, which keeps the rendezvous store, is gone ({_first_line(exc)})")

    def _say(self) -> None:
        self._beats += 1
        (step, working), (left, error) = self._at, self._left
        sign = _Sign(self._beats, step, working, axis.entered, left, error, socket.gethostname())
        self._store.set(f"{_SIGN}{self._mesh.rank}", json.dumps(sign))

    def _pass_on_a_stop(self) -> None:
        if self._stopping.is_set():
            self._store.set(_STOP, "1")
        elif self._store.check([_STOP]):
            self._stopping.set()

    def _hear(self, seen: dict[int, _Seen]) -> None:
        if self._store.check([_OVER]):
            self._end(self._store.get(_OVER).decode())
            return
        ranks = range(self._mesh.world) if self._mesh.is_first else range(1)
        now = time.monotonic()
        signs = self._store.multi_get([f"{_SIGN}{rank}" for rank in ranks])
        for rank, data in zip(ranks, signs, strict=True):
            sign = _Sign(*json.loads(data))
            last = seen.get(rank, _Seen(sign, now, now))
            moved = (sign.step, sign.working) != (last.sign.step, last.sign.working)
            alive = now if sign.beat != last.sign.beat else last.alive
            seen[rank] = _Seen(sign, alive, now if moved else last.moved)
        if problem := self._problem(seen, now):
            if self._mesh.is_first:
                self._store.set(_OVER, problem)
            self._end(problem)

    def _problem(self, seen: Mapping[int, _Seen], now: float) -> str | None:
        """What ends the job, if anything does."""
        working, hung = [], False
        for rank, (sign, alive, moved) in seen.items():
            who = f"rank {rank} ({sign.host})"
            if sign.left:
                if sign.error is not None:
                    return f"{who} has ended: {sign.error}"
            elif now - alive > self._lost_seconds:
                return f"{who} is lost: no sign of life for {now - alive:.0f} s"
            elif sign.working:
                working.append((sign.step, sign.collectives, who))
                hung = hung or now - moved > self._hung_seconds
        if not self._mesh.is_first or not hung:
            return None
        step, collectives, _ = min(working)  # the others wait for those that are behind
        behind = ", ".join(who for *at, who in working if at == [step, collectives])
        return f"{behind}: hung at step {step}; its log tells where its threads stand"

    def _judge(self) -> None:
        """End the job when the store does not even refuse to answer."""
        while not self._ended.wait(_BEAT_SECONDS) and not self._over.is_set():
            if time.monotonic() - self._heard > self._lost_seconds:
                self._end("rank 0, which keeps the rendezvous store, does not answer")

    def _end(self, verdict: str) -> None:
        """Make the verdict known; end the process if the training's thread does not."""
        self._verdict = f"{verdict}; start again to go on from the last checkpoint"
        self._over.set()
        if self._ended.wait(_GRACE_SECONDS):
            return
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.write(f"error: {self._verdict}\n")
        sys.stderr.flush()
        os._exit(RankLostError.exit_code)


def _own_client(world: int, limit_seconds: float) -> Any:
    """A connection of its own to the store that the ranks met at: the other may be in use."""
    return dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world,
        is_master=False,
        timeout=timedelta(seconds=limit_seconds),
    )


def _is_about_others(error: BaseException | None) -> bool:
    """Whether it is a collective that failed because another rank did."""
    words = str(error)
    return not isinstance(error, DistSaeError) and (
        isinstance(error, dist.DistError) or "gloo" in words or "NCCL" in words
    )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
