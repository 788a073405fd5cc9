"""Forward passes with asynchronous copies of rows to the CPU. Batches are split to fit memory."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dist_sae.device import moved
from dist_sae.errors import ModelError
from dist_sae.models.base import ActivationSource

logger = logging.getLogger(__name__)

Work = Callable[[Tensor, Tensor], dict[str, Tensor]]
"""Maps (tokens, mask) to activations at every site."""

_MAX_PENDING = 2  # batches whose copies may be unfinished; bounds their memory


@runtime_checkable
class Event(Protocol):
    """A device event to wait for, such as `torch.cuda.Event`."""

    def synchronize(self) -> None: ...


class RowTransfer:
    """An asynchronous copy of rows at every site from the model's device to the CPU."""

    def __init__(self, rows: dict[str, Tensor], copied: Event | None) -> None:
        self._rows = rows
        self._copied = copied
        self._one_at_a_time = threading.Lock()  # the model's and the consumer's thread both wait

    def wait(self) -> dict[str, Tensor]:
        """Wait for the copy, and return `[rows, d_in]` at every site, on the CPU."""
        with self._one_at_a_time:
            if self._copied is not None:
                self._copied.synchronize()
                self._copied = None
                # torch never releases pinned memory; after this clone, the next batch reuses it
                self._rows = {site: rows.clone() for site, rows in self._rows.items()}
            return self._rows


class Forward:
    """Runs a model over batches, and splits them after an out-of-memory error.

    Args:
        source: The model.
        dtype: Type of the resulting rows; None keeps the model's.
    """

    def __init__(self, source: ActivationSource, dtype: torch.dtype | None) -> None:
        self._source = source
        self._dtype = dtype
        self._parts = 1
        """Number of parts of a batch; doubled, permanently, when memory runs out."""
        self._pending: deque[RowTransfer] = deque()
        self._stream: torch.cuda.Stream | None = None
        self._device = torch.device("cpu")  # device of the previous batch's activations

    def __call__(
        self,
        tokens: Int[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch seq"],
        keep: Bool[Tensor, "batch seq"],
    ) -> list[RowTransfer]:
        """Run a batch, and return the rows that `keep` marks, in order, in one or more parts.

        Raises:
            ModelError: Memory does not suffice for a single context.
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
            if torch.cuda.is_available():  # not in the handler: the exception references tensors
                torch.cuda.empty_cache()
            self._parts *= 2
            logger.warning(
                "out of memory: batches are run in %d parts from now on; lower model.batch_tokens",
                self._parts,
            )

    def _run(self, tokens: Tensor, mask: Tensor, keep: Tensor) -> RowTransfer:
        while len(self._pending) >= _MAX_PENDING:
            self._pending.popleft().wait()
        index = keep.flatten().nonzero()[:, 0]
        index = moved(index, self._device)  # before the model's kernels, else it waits for them
        acts = self._source.run(tokens, mask)
        self._device = next(iter(acts.values())).device
        index = index.to(self._device)
        rows = {
            site: of_site.flatten(0, 1).index_select(0, index).to(self._dtype)
            for site, of_site in acts.items()
        }
        transfer = self.send(rows)
        self._pending.append(transfer)
        return transfer

    def send(self, rows: dict[str, Tensor]) -> RowTransfer:
        """Copy rows from a GPU to pinned memory. Uses a separate stream, so the model can go on."""
        if not next(iter(rows.values())).is_cuda:
            return RowTransfer(rows, None)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copies = {site: of_site.to("cpu", non_blocking=True) for site, of_site in rows.items()}
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        for of_site in rows.values():  # the allocator must not reuse them until the copy is done
            of_site.record_stream(self._stream)
        return RowTransfer(copies, copied)


def without_retries(run: Work) -> Work:
    """Wrap the `run` of a model on several ranks, where one rank must not retry alone.

    The wrapped function raises `ModelError` when memory runs out, so that nothing is retried.
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
    """Return whether an exception means that device or host memory ran out.

    Often only the text of torch's exceptions shows this.
    """
    text = str(exc)
    signs = ("can't allocate", "out of memory", "ALLOC_FAILED")
    return isinstance(exc, torch.OutOfMemoryError | MemoryError) or any(s in text for s in signs)
