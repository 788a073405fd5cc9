"""Ranks watch one another: a stop reaches all of them, and a lost or hung rank ends the job.

Every rank writes a heartbeat to the rendezvous store twice a second. Rank 0 reads all heartbeats,
and publishes a verdict if a rank is lost, hung or has failed. The others read the verdict and rank
0's heartbeat. All this runs in background threads, because the training thread may be blocked in a
collective or waiting for data. If the job must end and the training thread does not return, the
process exits.

Only the watch ends a job for these reasons: process groups have no timeout (`mesh.py`), and errors
of NCCL do not end a process.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple, TypeGuard

import torch.distributed as dist

from dist_sae.distributed import axis
from dist_sae.distributed.rendezvous import Ranks
from dist_sae.errors import DistSaeError, RankLostError, Stopped

_BEAT_SECONDS = 0.5
GRACE_SECONDS = 5.0
"""Time for the training thread to fail with its own error."""
_STOP, _VERDICT, _HEARTBEAT, _DONE = "stop", "verdict", "heartbeat/", "done"
# by default, torch ends a process with exit code 134 when an NCCL peer is gone, or when torch's own
# NCCL thread is stuck for 8 minutes. The watch could then not report which rank is at fault
_LEFT_TO_THE_WATCH = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}


class _Heartbeat(NamedTuple):
    """A rank's state, as the rank writes it to the store."""

    beat: int
    step: int
    working: bool
    """False while the rank waits for data, for the store, or for other ranks that do."""
    collectives: int
    """Number of collectives entered. The rank with the fewest keeps the others waiting."""
    left: bool
    """True once the rank has finished."""
    error: str | None
    """The failure with which the rank finished, if any."""


# stands for a rank that has joined the rendezvous and not written a heartbeat yet
_SILENT = _Heartbeat(beat=0, step=0, working=False, collectives=0, left=False, error=None)


class _Seen(NamedTuple):
    """A rank's last heartbeat, with times on the reader's clock."""

    heartbeat: _Heartbeat
    alive: float
    """Time at which the heartbeat was first read."""
    moved: float
    """Time of the last change in the rank's step or `working`."""


class Watch:
    """This rank's part of the watch. A context manager.

    Args:
        ranks: The ranks of the job.
        stopping: When set on one rank, it is set on all within seconds.
        lost_seconds: A rank without a heartbeat for this long is lost.
        hung_seconds: A rank that works on one step for this long is hung.
        group_ranks: Number of ranks in a group of neighbors that train in lockstep. None if all
            ranks do.
    """

    def __init__(
        self,
        ranks: Ranks,
        stopping: threading.Event,
        *,
        lost_seconds: float,
        hung_seconds: float,
        group_ranks: int | None = None,
    ) -> None:
        self._group_ranks = group_ranks or ranks.world
        self._ranks = ranks
        self._stopping = stopping
        self._lost_seconds = lost_seconds
        self._hung_seconds = hung_seconds
        self._beats = 0
        # each is assigned as a whole and by one thread only, so no update can be lost
        self._at = (0, False)
        self._left: tuple[bool, str | None] = (False, None)
        self._ended = threading.Event()
        self._alone = threading.Event()  # all others have left
        self._over = threading.Event()  # the job must end
        self._done = False
        self._verdict = ""
        self._answered = time.monotonic()  # when the store last answered
        self._threads = [
            threading.Thread(target=work, name=f"watch-{work.__name__}", daemon=True)
            for work in (self._beat, self._watch_store)
        ]

    def set_step(self, step: int, *, working: bool) -> None:
        """Record this rank's current step, and whether the rank is working on it."""
        self._at = (step, working)

    def done(self, *, wait: bool) -> None:
        """Record that this rank's group has ended. Its failure then does not end other groups.

        Args:
            wait: Whether to wait for the other groups, or for a stop. A failed group must wait,
                because the supervisor of the ranks ends all of them when one fails.
        """
        self._done = True
        self.set_step(self._at[0], working=False)
        if self._ranks.world == 1:
            return
        store = self._ranks.connect()
        n = store.add(_DONE, 1)
        while wait and n < self._ranks.world and not self._stopping.wait(_BEAT_SECONDS):
            if self._over.is_set():
                return
            n = store.add(_DONE, 0)

    def __enter__(self) -> "Watch":
        if self._ranks.world > 1:
            for name, value in _LEFT_TO_THE_WATCH.items():
                os.environ.setdefault(name, value)
            self._store = self._ranks.connect()
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self._ranks.world == 1:
            return
        failed = None
        if error is not None and not self._done and not isinstance(error, Stopped):
            failed = _first_line(error)
        if failed is None and self._ranks.rank == 0:
            # the others must leave first, because the store ends with this process
            while not (self._alone.wait(_BEAT_SECONDS) or self._over.is_set()):
                pass
        if _is_about_others(error):
            # wait until it is known which rank failed
            self._over.wait(self._lost_seconds + GRACE_SECONDS)
            self._leave(None)
            if self._stopping.is_set() and not self._verdict:
                raise Stopped("stopped while other ranks were working; start again") from error
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
            thread.join(GRACE_SECONDS)
        if self._ranks.rank == 0 and (error or self._verdict):
            time.sleep(3 * _BEAT_SECONDS)  # time for the others to read it

    def _beat(self) -> None:
        """Write this rank's heartbeats and read the others', until this rank leaves."""
        try:
            seen: dict[int, _Seen] = {}
            while not self._ended.wait(_BEAT_SECONDS):
                self._write()
                self._share_stop()
                self._read(seen)
                self._answered = time.monotonic()
            self._write()  # report that this rank has left
        except dist.DistError as exc:
            if not self._ended.is_set():
                self._end(f"rank 0, which hosts the ranks' store, is gone ({_first_line(exc)})")

    def _write(self) -> None:
        self._beats += 1
        (step, working), (left, error) = self._at, self._left
        heartbeat = _Heartbeat(self._beats, step, working, axis.entered, left, error)
        self._store.set(f"{_HEARTBEAT}{self._ranks.rank}", json.dumps(heartbeat))

    def _share_stop(self) -> None:
        if self._stopping.is_set():
            self._store.set(_STOP, "1")
        elif self._store.check([_STOP]):
            self._stopping.set()

    def _read(self, seen: dict[int, _Seen]) -> None:
        if self._store.check([_VERDICT]):
            self._end(self._store.get(_VERDICT).decode())
            return
        now = time.monotonic()
        for rank, heartbeat in self._heartbeats(seen).items():
            last = seen.get(rank, _Seen(_SILENT, now, now))
            before = last.heartbeat
            moved = (heartbeat.step, heartbeat.working) != (before.step, before.working)
            alive = now if heartbeat.beat != before.beat else last.alive
            seen[rank] = _Seen(heartbeat, alive, now if moved else last.moved)
        if all(heartbeat.left for rank, (heartbeat, *_) in seen.items() if rank):
            self._alone.set()
        if problem := self._problem(seen, now):
            if self._ranks.rank == 0:
                self._store.set(_VERDICT, problem)
            self._end(problem)

    def _heartbeats(self, seen: Mapping[int, _Seen]) -> dict[int, _Heartbeat]:
        """Read the heartbeats that this rank checks: all of them on rank 0, otherwise rank 0's.

        Once each of these ranks has written one, a single request reads all.
        """
        ranks = range(self._ranks.world if self._ranks.rank == 0 else 1)
        keys = [f"{_HEARTBEAT}{rank}" for rank in ranks]
        if all(rank in seen and seen[rank].heartbeat.beat for rank in ranks):
            written = self._store.multi_get(keys)
        else:
            written = [self._store.get(key) if self._store.check([key]) else None for key in keys]
        return {
            r: _Heartbeat(*json.loads(s)) if s else _SILENT
            for r, s in zip(ranks, written, strict=True)
        }

    def _problem(self, seen: Mapping[int, _Seen], now: float) -> str | None:
        """Return why the job must end, or None."""
        working: dict[int, list[tuple[int, int, str]]] = {}
        hung = set[int]()
        for rank, (heartbeat, alive, moved) in seen.items():
            who = f"rank {rank} ({self._ranks.hosts[rank]})"
            if heartbeat.left:
                if heartbeat.error is not None:
                    return f"{who} has failed: {heartbeat.error}"
            elif now - alive > self._lost_seconds:
                return f"{who} is lost: no heartbeat for {now - alive:.0f} s"
            elif heartbeat.working:
                group = rank // self._group_ranks
                at = heartbeat.step, heartbeat.collectives, who
                working.setdefault(group, []).append(at)
                if now - moved > self._hung_seconds:
                    hung.add(group)
        if self._ranks.rank or not hung:
            return None
        group_of = working[min(hung)]
        step, collectives, _ = min(group_of)  # the others wait for the ranks that are behind
        behind = ", ".join(who for *at, who in group_of if at == [step, collectives])
        return f"{behind}: hung at step {step}; its log has the stacks of its threads"

    def _watch_store(self) -> None:
        """End the job if a call to the store does not return."""
        while not self._ended.wait(_BEAT_SECONDS) and not self._over.is_set():
            if time.monotonic() - self._answered > self._lost_seconds:
                self._end("rank 0, which hosts the ranks' store, does not respond")

    def _end(self, verdict: str) -> None:
        """Ask the training thread to end with this error. Exit the process if it does not."""
        self._verdict = f"{verdict}; start again to continue"
        self._over.set()
        if self._ended.wait(GRACE_SECONDS):
            return
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.write(f"error: {self._verdict}\n")
        sys.stderr.flush()
        os._exit(RankLostError.exit_code)


def _is_about_others(error: BaseException | None) -> TypeGuard[BaseException]:
    """Return True if a collective failed because another rank did."""
    words = str(error)
    return not isinstance(error, DistSaeError) and (
        isinstance(error, dist.DistError) or "gloo" in words or "NCCL" in words
    )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
