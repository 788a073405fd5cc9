"""Ranks that watch over one another: a stop is passed on, and a lost or hung rank ends the job.

Every rank leaves a sign of life in the store that they met at twice a second. The first rank reads
all of them and says when one is missing; the others read what it says, and its sign. A rank that
waits for data, for the others, or is inside a collective takes part in nothing else, so none of
this needs the training's thread: when the job must end and that thread does not come back by
itself, the process is ended.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import NamedTuple, TypeGuard

import torch.distributed as dist

from dist_sae.distributed import axis
from dist_sae.distributed.rendezvous import Ranks
from dist_sae.errors import DistSaeError, RankLostError, Stopped

_BEAT_SECONDS = 0.5
_GRACE_SECONDS = 5.0  # for the training's thread to end by itself, with an error of its own
_STOP, _OVER, _SIGN = "stop", "over", "sign/"


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


# of a rank that has met the others and not yet said more
_SILENT = _Sign(beat=0, step=0, working=False, collectives=0, left=False, error=None)


class _Seen(NamedTuple):
    """The last sign of a rank, and when it was new."""

    sign: _Sign
    alive: float
    moved: float
    """When it came to where it is."""


class Watch:
    """This rank's part of the watch, while in its `with`.

    Args:
        ranks: Those that have met.
        stopping: Set on one rank, it is set on all within seconds.
        lost_seconds: A rank that gives no sign of life for so long is lost.
        hung_seconds: A rank that works on one step for so long is hung.
    """

    def __init__(
        self, ranks: Ranks, stopping: threading.Event, *, lost_seconds: float, hung_seconds: float
    ) -> None:
        self._ranks = ranks
        self._stopping = stopping
        self._lost_seconds = lost_seconds
        self._hung_seconds = hung_seconds
        self._beats = 0
        # each is written by one thread, whole: what the two wrote together could be lost
        self._at = (0, False)
        self._left: tuple[bool, str | None] = (False, None)
        self._ended = threading.Event()
        self._alone = threading.Event()  # all others have left
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
        if self._ranks.world > 1:
            self._store = self._ranks.connect()
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._ranks.world == 1:
            return
        failed = None if error is None or isinstance(error, Stopped) else _first_line(error)
        if failed is None and self._ranks.rank == 0:  # the store ends with this process
            while not (self._alone.wait(_BEAT_SECONDS) or self._over.is_set()):
                pass
        if _is_about_others(error):
            self._over.wait(self._lost_seconds + _GRACE_SECONDS)  # until it is known which
            self._leave(None)
            if self._stopping.is_set() and not self._verdict:
                raise Stopped("stopped while others were at work; start again") from error
            words = f"another rank has failed ({_first_line(error)}); start again"
            raise RankLostError(self._verdict or words) from error
        if failed is None and self._over.is_set():
            self._leave(None)
            raise RankLostError(self._verdict) from error
        self._leave(failed)

    def _leave(self, error: str | None) -> None:
        self._left = (True, error)
        self._ended.set()
        for thread in self._threads:
            thread.join(_GRACE_SECONDS)
        if self._ranks.rank == 0 and (error or self._verdict):
            time.sleep(3 * _BEAT_SECONDS)  # let the others hear

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
                self._end(f"rank 0, which keeps the ranks' store, is gone ({_first_line(exc)})")

    def _say(self) -> None:
        self._beats += 1
        (step, working), (left, error) = self._at, self._left
        sign = _Sign(self._beats, step, working, axis.entered, left, error)
        self._store.set(f"{_SIGN}{self._ranks.rank}", json.dumps(sign))

    def _pass_on_a_stop(self) -> None:
        if self._stopping.is_set():
            self._store.set(_STOP, "1")
        elif self._store.check([_STOP]):
            self._stopping.set()

    def _hear(self, seen: dict[int, _Seen]) -> None:
        if self._store.check([_OVER]):
            self._end(self._store.get(_OVER).decode())
            return
        now = time.monotonic()
        for rank, sign in self._signs(seen).items():
            last = seen.get(rank, _Seen(_SILENT, now, now))
            moved = (sign.step, sign.working) != (last.sign.step, last.sign.working)
            alive = now if sign.beat != last.sign.beat else last.alive
            seen[rank] = _Seen(sign, alive, now if moved else last.moved)
        if all(sign.left for rank, (sign, *_) in seen.items() if rank):
            self._alone.set()
        if problem := self._problem(seen, now):
            if self._ranks.rank == 0:
                self._store.set(_OVER, problem)
            self._end(problem)

    def _signs(self, seen: Mapping[int, _Seen]) -> dict[int, _Sign]:
        """What those say that this rank listens to, one after the other until each has spoken."""
        ranks = range(self._ranks.world if self._ranks.rank == 0 else 1)
        keys = [f"{_SIGN}{rank}" for rank in ranks]
        if all(rank in seen and seen[rank].sign.beat for rank in ranks):
            signs = self._store.multi_get(keys)
        else:
            signs = [self._store.get(key) if self._store.check([key]) else None for key in keys]
        return {
            r: _Sign(*json.loads(s)) if s else _SILENT for r, s in zip(ranks, signs, strict=True)
        }

    def _problem(self, seen: Mapping[int, _Seen], now: float) -> str | None:
        """What ends the job, if anything does."""
        working, hung = [], False
        for rank, (sign, alive, moved) in seen.items():
            who = f"rank {rank} ({self._ranks.hosts[rank]})"
            if sign.left:
                if sign.error is not None:
                    return f"{who} has ended: {sign.error}"
            elif now - alive > self._lost_seconds:
                return f"{who} is lost: no sign of life for {now - alive:.0f} s"
            elif sign.working:
                working.append((sign.step, sign.collectives, who))
                hung = hung or now - moved > self._hung_seconds
        if self._ranks.rank or not hung:
            return None
        step, collectives, _ = min(working)  # the others wait for those that are behind
        behind = ", ".join(who for *at, who in working if at == [step, collectives])
        return f"{behind}: hung at step {step}; its log tells where its threads stand"

    def _judge(self) -> None:
        """End the job when the store does not even refuse to answer."""
        while not self._ended.wait(_BEAT_SECONDS) and not self._over.is_set():
            if time.monotonic() - self._heard > self._lost_seconds:
                self._end("rank 0, which keeps the ranks' store, does not answer")

    def _end(self, verdict: str) -> None:
        """Make the verdict known; end the process if the training's thread does not."""
        self._verdict = f"{verdict}; start again to go on"
        self._over.set()
        if self._ended.wait(_GRACE_SECONDS):
            return
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.write(f"error: {self._verdict}\n")
        sys.stderr.flush()
        os._exit(RankLostError.exit_code)


def _is_about_others(error: BaseException | None) -> TypeGuard[BaseException]:
    """Whether it is a collective that failed because another rank did."""
    words = str(error)
    return not isinstance(error, DistSaeError) and (
        isinstance(error, dist.DistError) or "gloo" in words or "NCCL" in words
    )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
