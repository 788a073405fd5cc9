"""A model at work: rows leave its device while it goes on, and batches shrink to its memory."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dist_sae.errors import ModelError
from dist_sae.models.base import ActivationSource

logger = logging.getLogger(__name__)

Work = Callable[[Tensor, Tensor], dict[str, Tensor]]
"""Of (tokens, mask): activations at every site."""

_MOST_UNDER_WAY = 2  # what a GPU is ahead of its copies, so what they hold of its memory


@runtime_checkable
class Event(Protocol):
    """Something on a device that can be waited for, as `torch.cuda.Event` is."""

    def synchronize(self) -> None: ...


class Leaving:
    """Rows at every site on their way off the model's device."""

    def __init__(self, rows: dict[str, Tensor], copied: Event | None) -> None:
        self._rows = rows
        self._copied = copied
        self._one_at_a_time = threading.Lock()  # who runs the model waits, and who uses the rows

    def arrived(self) -> dict[str, Tensor]:
        """`[rows, d_in]` at every site, on the CPU; waits for them."""
        with self._one_at_a_time:
            if self._copied is not None:
                self._copied.synchronize()
                self._copied = None
                # pinned memory is never given back: the next batch gets this batch's
                self._rows = {site: rows.clone() for site, rows in self._rows.items()}
            return self._rows


class Forward:
    """Runs a source over batches.

    Args:
        source: The model.
        dtype: Rows leave in it, or as the model gives them.
    """

    def __init__(self, source: ActivationSource, dtype: torch.dtype | None) -> None:
        self._source = source
        self._dtype = dtype
        self._parts = 1
        """Of a batch; doubled when memory is short, and from then on."""
        self._under_way: deque[Leaving] = deque()
        self._stream: torch.cuda.Stream | None = None
        self._device = torch.device("cpu")  # of the batch before

    def __call__(
        self,
        tokens: Int[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch seq"],
        keep: Bool[Tensor, "batch seq"],
    ) -> list[Leaving]:
        """The rows that `keep` names, in the order of the batch, in one part or several.

        Raises:
            ModelError: Not even a single context fits into memory.
        """
        while True:
            try:
                rows = -(-len(tokens) // self._parts)
                parts = (torch.split(tensor, rows) for tensor in (tokens, mask, keep))
                return [self._run(*part) for part in zip(*parts, strict=True)]
            except (RuntimeError, MemoryError) as exc:
                if not _is_out_of_memory(exc):
                    raise
                if self._parts >= len(tokens):
                    raise ModelError(
                        f"model: a single context of {tokens.shape[1]} tokens does not fit "
                        f"into memory; lower activations.context_tokens, or use a narrower "
                        f"model.dtype or a larger device"
                    ) from exc
            if torch.cuda.is_available():  # not while the exception holds what was allocated
                torch.cuda.empty_cache()
            self._parts *= 2
            logger.warning(
                "out of memory: batches are run in %d parts from now on; lower model.batch_tokens",
                self._parts,
            )

    def _run(self, tokens: Tensor, mask: Tensor, keep: Tensor) -> Leaving:
        while len(self._under_way) >= _MOST_UNDER_WAY:
            self._under_way.popleft().arrived()
        index = keep.flatten().nonzero()[:, 0]
        if self._device.type == "cuda":  # on its way before the model is: it waits for nothing
            index = index.pin_memory().to(self._device, non_blocking=True)
        acts = self._source.run(tokens, mask)
        self._device = next(iter(acts.values())).device
        index = index.to(self._device)
        rows = {
            site: of_site.flatten(0, 1).index_select(0, index).to(self._dtype)
            for site, of_site in acts.items()
        }
        leaving = self._send(rows)
        self._under_way.append(leaving)
        return leaving

    def _send(self, rows: dict[str, Tensor]) -> Leaving:
        """Off a GPU on a stream of their own, into pinned memory: the model need not wait."""
        if not next(iter(rows.values())).is_cuda:
            return Leaving(rows, None)
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            copies = {site: of_site.to("cpu", non_blocking=True) for site, of_site in rows.items()}
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        for of_site in rows.values():  # their memory is not to be used again before
            of_site.record_stream(self._stream)
        return Leaving(copies, copied)


def in_step(run: Work) -> Work:
    """A source's `run` where other ranks run the same: a second try would be out of step.

    What it then raises when memory is short is a `ModelError`.
    """

    def work(tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        try:
            return run(tokens, mask)
        except (RuntimeError, MemoryError) as exc:
            if not _is_out_of_memory(exc):
                raise
            raise ModelError(
                "model: out of memory; lower model.batch_tokens or raise model.tensor_parallel"
            ) from exc

    return work


def _is_out_of_memory(exc: BaseException) -> bool:
    """Of the device, or of this machine: torch says that in words alone."""
    said = str(exc)
    signs = ("can't allocate", "out of memory", "ALLOC_FAILED")
    return isinstance(exc, torch.OutOfMemoryError | MemoryError) or any(s in said for s in signs)
