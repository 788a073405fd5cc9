"""Times the phases of training steps without waiting for the device."""

import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dist_sae.dictionaries.base import Dictionary
from dist_sae.telemetry.metric import OTHERS

MAX_MARKS = 256
"""Number of stored marks above which the oldest is read, if this needs no wait for the GPU."""
_SAMPLE_LATENTS = (1024, 2048)  # minimum and maximum of a sample; fewer are slower per latent
_SAMPLE_ROWS = 4096
_SAMPLED_SHARE = 1 / 32
MAX_SAMPLE_SHARE = 0.002
"""Maximum share of the total time that samples may take."""


class Clock:
    """The device's clock. A mark records when all work queued before is done, and is read later."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"

    def mark(self) -> Any:
        """Return a mark of the current time; on a GPU, of the end of the work queued so far."""
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def is_past(self, mark: Any) -> bool:
        """Return True if a mark can be read without waiting."""
        return bool(mark.query()) if self.is_cuda else True

    def await_(self, mark: Any) -> None:
        """Wait until a mark can be read."""
        if self.is_cuda:
            mark.synchronize()

    def seconds(self, start: Any, end: Any) -> float:
        """Return the seconds between two marks, which must both be in the past."""
        return float(start.elapsed_time(end) / 1e3 if self.is_cuda else end - start)


class Phases:
    """Time of each job by phase. A job's phases add up to the elapsed time.

    A phase belongs either to all jobs or to one job. For the other jobs, the time of one job's
    phase counts as `OTHERS`.

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
        """End a phase, and count the time since the last call as this phase.

        Args:
            phase: Name of the phase.
            job: The job that the phase belongs to; None if it belongs to all jobs.
            within: Maximum seconds that count as other phases instead, subtracted in this order.
            in_ranks: Marks before and after each part of the phase that counts as `ranks`.
        """
        self._marks.append(_Mark(phase, job, within or {}, in_ranks, self._clock.mark()))
        if len(self._marks) > MAX_MARKS and self._clock.is_past(self._marks[1].end):
            self._fold()

    def take(self, job: str) -> dict[str, float]:
        """Return a job's seconds by phase since its last `take`. On a GPU, wait for the device."""
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
    """Times a step's bare encoder product on this rank, which is a lower bound for the step.

    Now and then, a small part of the product is timed and scaled up. The fastest sample counts,
    because slower ones shared the machine with other work. Samples take a bounded share of the
    time (`MAX_SAMPLE_SHARE`).
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

    def cap(self, seconds: float) -> None:
        """Cap the time at that of an average forward pass, which includes the product."""
        if self._best != float("inf"):
            self._best = min(self._best, seconds)

    @torch.no_grad()
    def sample(self, x: torch.Tensor) -> None:
        """Time a part of the product on this rank's rows `x`, unless samples took too long."""
        self._read()
        if self._spent > MAX_SAMPLE_SHARE * (time.monotonic() - self._since):
            return
        sae, dtype = self._sae, self._sae.product_dtype
        least, most = _SAMPLE_LATENTS
        n = min(len(sae.W_enc), max(least, min(most, int(_SAMPLED_SHARE * len(sae.W_enc)))))
        weights = sae.W_enc[:n].to(dtype)
        rows = x[:_SAMPLE_ROWS, : weights.shape[1]].to(dtype)  # only as wide as a latent's input
        out = torch.empty(len(rows), n, dtype=dtype, device=x.device)
        torch.mm(rows[:64], weights.T, out=out[:64])  # warm-up: map memory, load libraries
        start = self._clock.mark()
        torch.mm(rows, weights.T, out=out)
        end = self._clock.mark()
        # this rank's rows are multiplied with the latents of all shards
        whole = len(x) * sae.config.preacts_per_row
        self._under_way = start, end, whole / (len(rows) * n)
        self._read()

    def _read(self) -> None:
        if self._under_way is None or not self._clock.is_past(self._under_way[1]):
            return
        start, end, scale = self._under_way
        self._under_way = None
        seconds = self._clock.seconds(start, end)
        self._spent += 2 * seconds  # roughly includes the copies
        self._best = min(self._best, seconds * scale)
