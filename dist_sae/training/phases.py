"""Where the time of training steps goes, without waiting for the device."""

import time
from collections import defaultdict, deque
from collections.abc import Mapping
from typing import Any

import torch

from dist_sae.dictionaries.base import Dictionary

_FOLD_FROM = 256  # marks of a GPU's clock that are kept before those behind it are read
_SAMPLE_LATENTS = (1024, 2048)  # least and most of a sample: fewer are slower, each
_SAMPLE_ROWS = 4096
_SAMPLED_SHARE = 1 / 32
_MOST_TIME = 0.002  # share of all time that samples may take


class Clock:
    """The device's own: a mark is taken when the work before it is done, and read later."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"

    def mark(self) -> Any:
        """Now, or on a GPU when what was begun before is done."""
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def is_past(self, mark: Any) -> bool:
        """Whether a mark can be read without waiting."""
        return bool(mark.query()) if self.is_cuda else True

    def await_(self, mark: Any) -> None:
        """Wait until it can."""
        if self.is_cuda:
            mark.synchronize()

    def seconds(self, start: Any, end: Any) -> float:
        """From one mark to another, both in the past."""
        return float(start.elapsed_time(end) / 1e3 if self.is_cuda else end - start)


class Phases:
    """Time by phase; all of it is in one, so they add up to the time that passed."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._marks: deque[tuple[str, Mapping[str, float], Any]] = deque([("", {}, clock.mark())])

    def end(self, phase: str, within: Mapping[str, float] | None = None) -> None:
        """What was done since the last call was this phase.

        Args:
            phase: What to call it.
            within: Other phases that took so many seconds of it, at most; the first come first.
        """
        self._marks.append((phase, within or {}, self._clock.mark()))
        if len(self._marks) > _FOLD_FROM and self._clock.is_past(self._marks[1][2]):
            self._fold()

    def take(self) -> dict[str, float]:
        """Seconds since the last call, by phase. On a GPU this waits for it."""
        self._clock.await_(self._marks[-1][2])
        while len(self._marks) > 1:
            self._fold()
        seconds, self._seconds = self._seconds, defaultdict(float)
        return dict(seconds)

    def _fold(self) -> None:
        *_, start = self._marks.popleft()
        phase, within, end = self._marks[0]
        left = self._clock.seconds(start, end)
        for other, most in within.items():
            seconds = min(left, max(most, 0.0))
            self._seconds[other] += seconds
            left -= seconds
        self._seconds[phase] += left


class ProductSamples:
    """Time of the bare encoder product of a step on this rank, the limit of what a step can be.

    Now and then a small part of it is computed and scaled up. The fastest counts: the others had to
    share the machine. Time for it is bounded by a share of all time.
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
        """The product's, as far as it is known."""
        return None if self._best == float("inf") else self._best

    def at_most(self, seconds: float) -> None:
        """It takes no longer than forward passes, which it is part of, took on average."""
        if self._best != float("inf"):
            self._best = min(self._best, seconds)

    @torch.no_grad()
    def sample(self, x: torch.Tensor) -> None:
        """Time a part of the product; `x` are this rank's rows."""
        self._read()
        if self._spent > _MOST_TIME * (time.monotonic() - self._since):
            return
        sae, dtype = self._sae, self._sae.product_dtype
        least, most = _SAMPLE_LATENTS
        n = min(len(sae.W_enc), max(least, min(most, int(_SAMPLED_SHARE * len(sae.W_enc)))))
        rows, weights = x[:_SAMPLE_ROWS].to(dtype), sae.W_enc[:n].to(dtype)
        out = torch.empty(len(rows), n, dtype=dtype, device=x.device)
        torch.mm(rows[:64], weights.T, out=out[:64])  # memory is mapped, libraries are ready
        start = self._clock.mark()
        torch.mm(rows, weights.T, out=out)
        end = self._clock.mark()
        # each of this rank's rows meets as many latents of all shards
        whole = len(x) * sae.config.latents_met
        self._under_way = start, end, whole / (len(rows) * n)
        self._read()

    def _read(self) -> None:
        if self._under_way is None or not self._clock.is_past(self._under_way[1]):
            return
        start, end, scale = self._under_way
        self._under_way = None
        seconds = self._clock.seconds(start, end)
        self._spent += 2 * seconds  # the copies as well
        self._best = min(self._best, seconds * scale)
