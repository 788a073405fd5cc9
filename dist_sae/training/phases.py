"""Times the phases of training steps without waiting for the device."""

import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dist_sae.dictionaries.base import Dictionary
from dist_sae.telemetry.metric import OTHERS

MOST_MARKS = 256
"""Marks of a GPU's clock that are kept before past ones are read."""
_SAMPLE_LATENTS = (1024, 2048)  # least and most of a sample: fewer are slower per latent
_SAMPLE_ROWS = 4096
_SAMPLED_SHARE = 1 / 32
MOST_SAMPLE_SHARE = 0.002
"""Share of the whole time that samples may take."""


class Clock:
    """The device's clock: a mark is set when the work before it is done, and read later."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"

    def mark(self) -> Any:
        """The current time; on a GPU the time when the work queued so far is done."""
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def is_past(self, mark: Any) -> bool:
        """True if a mark can be read without waiting."""
        return bool(mark.query()) if self.is_cuda else True

    def await_(self, mark: Any) -> None:
        """Wait until a mark can be read."""
        if self.is_cuda:
            mark.synchronize()

    def seconds(self, start: Any, end: Any) -> float:
        """Seconds between two marks, both in the past."""
        return float(start.elapsed_time(end) / 1e3 if self.is_cuda else end - start)


class Phases:
    """Time of each job by phase. For a job they add up to the time passed.

    A phase is one job's, and for the other jobs it is time in `OTHERS`; or it is all jobs'.

    Args:
        jobs: Names of the jobs.
    """

    def __init__(self, clock: Clock, *jobs: str) -> None:
        self._clock = clock
        self._seconds = {job: defaultdict[str, float](float) for job in jobs}
        first = _Mark("", None, {}, (), clock.mark())
        self._marks: deque[_Mark] = deque([first])

    def end(
        self,
        phase: str,
        job: str | None = None,
        within: Mapping[str, float] | None = None,
        in_ranks: Sequence[tuple[Any, Any]] = (),
    ) -> None:
        """End a phase: the time since the last call belongs to it.

        Args:
            phase: Its name.
            job: The job that it is of; None if it is all jobs'.
            within: Seconds of it, at most, that belong to other phases, in this order.
            in_ranks: Marks before and after each part of it that belongs to `ranks`.
        """
        self._marks.append(_Mark(phase, job, within or {}, in_ranks, self._clock.mark()))
        if len(self._marks) > MOST_MARKS and self._clock.is_past(self._marks[1].end):
            self._fold()

    def take(self, job: str) -> dict[str, float]:
        """Seconds of a job since the last call for it, by phase. On a GPU this waits for it."""
        self._clock.await_(self._marks[-1].end)
        while len(self._marks) > 1:
            self._fold()
        seconds, self._seconds[job] = self._seconds[job], defaultdict(float)
        return dict(seconds)

    def _fold(self) -> None:
        start = self._marks.popleft().end
        phase, of, within, in_ranks, end = self._marks[0]
        whole = left = self._clock.seconds(start, end)
        if in_ranks:
            within = {**within, "ranks": sum(self._clock.seconds(*span) for span in in_ranks)}
        parts = []
        for other, most in within.items():
            parts.append((other, min(left, max(most, 0.0))))
            left -= parts[-1][1]
        for job, seconds in self._seconds.items():
            own = of in (None, job)
            for name, spent in [*parts, (phase, left)] if own else [(OTHERS, whole)]:
                seconds[name] += spent


class _Mark(NamedTuple):
    """The end of a phase."""

    phase: str
    job: str | None
    within: Mapping[str, float]
    in_ranks: Sequence[tuple[Any, Any]]
    end: Any
    """The clock's mark."""


class ProductSamples:
    """Time of a step's bare encoder product on this rank, the lower bound of a step.

    Now and then a small part of the product is timed and scaled up. The fastest sample counts: the
    others shared the machine. Samples take a bounded share of the time.
    """

    def __init__(self, sae: Dictionary, clock: Clock) -> None:
        self._sae = sae
        self._clock = clock
        self._since = time.monotonic()
        self._spent = 0.0
        self._best = float("inf")
        self._under_way: tuple[Any, Any, float] | None = None

    @property
    def seconds(self) -> float | None:
        """Time of the product; None before the first sample."""
        return None if self._best == float("inf") else self._best

    def at_most(self, seconds: float) -> None:
        """Bound the time by that of a mean forward pass, which includes the product."""
        if self._best != float("inf"):
            self._best = min(self._best, seconds)

    @torch.no_grad()
    def sample(self, x: torch.Tensor) -> None:
        """Time a part of the product on this rank's rows `x`."""
        self._read()
        if self._spent > MOST_SAMPLE_SHARE * (time.monotonic() - self._since):
            return
        sae, dtype = self._sae, self._sae.product_dtype
        least, most = _SAMPLE_LATENTS
        n = min(len(sae.W_enc), max(least, min(most, int(_SAMPLED_SHARE * len(sae.W_enc)))))
        weights = sae.W_enc[:n].to(dtype)
        rows = x[:_SAMPLE_ROWS, : weights.shape[1]].to(dtype)  # as wide as what a latent reads
        out = torch.empty(len(rows), n, dtype=dtype, device=x.device)
        torch.mm(rows[:64], weights.T, out=out[:64])  # warm-up: map memory, load libraries
        start = self._clock.mark()
        torch.mm(rows, weights.T, out=out)
        end = self._clock.mark()
        # this rank's rows are multiplied with the latents of all shards
        whole = len(x) * sae.config.latents_met
        self._under_way = start, end, whole / (len(rows) * n)
        self._read()

    def _read(self) -> None:
        if self._under_way is None or not self._clock.is_past(self._under_way[1]):
            return
        start, end, scale = self._under_way
        self._under_way = None
        seconds = self._clock.seconds(start, end)
        self._spent += 2 * seconds  # includes the copies
        self._best = min(self._best, seconds * scale)
