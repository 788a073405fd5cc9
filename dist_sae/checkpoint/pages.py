"""Inference with a dictionary of any width in bounded memory, reading its checkpoint in pages.

A page is a range of consecutive latents, loaded as a separate dictionary (`PageAxis`). If each
shard decides about its latents independently (thresholds, experts), one pass over the pages sums
their parts of x_hat. If each row keeps its k largest codes, a first pass merges the pages' largest
codes, and a second pass decodes them. Each pass reads all weights, so it should process many rows;
see `grouped`.
"""

from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import Float
from torch import Tensor

from dist_sae.checkpoint.layout import Checkpoint
from dist_sae.checkpoint.state import load_weights, weights_of
from dist_sae.config.sae import SaeConfig
from dist_sae.dictionaries import build_sae
from dist_sae.dictionaries.axis import WHOLE, LatentAxis, PageAxis
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.interface import Codes, Inferred, Rows, Widths
from dist_sae.kernels import Entries, select
from dist_sae.kernels.keys import NO_ENTRY, from_keys, to_keys

SLICE_ROWS = 4096
"""Maximum number of rows that a page processes at a time."""
EncodedPage = tuple[Dictionary, slice, Codes]
"""A page or a rank's shard, a slice of rows, and its codes on these rows."""


class PagedDictionary:
    """A trained dictionary, loaded in full if it needs at most half of the memory, else in pages.

    With several shards, each rank loads its shard in full, and all ranks process the same rows
    together. When paging, the memory is divided into four quarters: the current page, the next
    page, which is read in the background, the rows, and the products together with the tensor part
    that is being read.

    Args:
        config: The recipe.
        widths: Widths of the sites. A number means an autoencoder of a single site of that width.
        checkpoint: The checkpoint with the weights.
        memory_bytes: Memory limit in bytes. None loads the whole dictionary. A page has at least
            one latent or expert, even if the limit is smaller.
        dtype: Precision of the weights.
        axis: This rank's place among the ranks that process the same rows.
        device: Device of the weights if they are loaded in full.

    Raises:
        CorruptObjectError, ObjectNotFoundError: The checkpoint is damaged or has been deleted. All
            methods raise these errors too.
    """

    def __init__(
        self,
        config: SaeConfig,
        widths: Widths | int,
        checkpoint: Checkpoint,
        memory_bytes: int | None = None,
        dtype: torch.dtype = torch.float32,
        axis: LatentAxis = WHOLE,
        device: torch.device | str = "cpu",
    ) -> None:
        self._config = config
        self._widths = Widths.of(widths)
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._axis = axis
        self._device = device
        self._stored = weights_of(checkpoint)
        with torch.device("meta"):
            shape = build_sae(config, self._widths, dtype=dtype)
        self._per_latent = {name for name, _ in shape.tensors() if shape.is_per_latent(name)}
        self._decoder = shape.decoder
        self._row_limit = shape.selection.row_limit
        n_bytes = sum(tensor.nbytes for _, tensor in shape.tensors())
        shared = sum(tensor.nbytes for tensor in shape.replicated)  # a copy is in each page
        self._page_latents = config.n_latents
        self._in_memory: Dictionary | None = None
        if memory_bytes is None or 2 * n_bytes <= memory_bytes or axis.shards > 1:
            self._in_memory = self._load(axis).to(device)
            return
        self._memory: list[dict[str, Tensor]] = [{}, {}]
        """Buffers for two pages, which are reused because a module is not freed until the garbage
        collector runs."""
        quarter = memory_bytes // 4
        fitting = max(0, quarter - shared) * config.n_latents // (n_bytes - shared)
        self._page_latents = _page_latents(config, fitting)
        # inputs, targets and reconstructions, keys and codes
        row_bytes = 4 * self._widths.d_in + 8 * self._widths.d_out + 12 * (self._row_limit or 0)
        product_bytes = 12 * min(self._page_latents, select.CHUNK_LATENTS)  # per row, with copies
        self._slice_rows = max(1, min(SLICE_ROWS, quarter // product_bytes))
        self._rows_per_pass = max(1, quarter // row_bytes // self._slice_rows) * self._slice_rows

    @property
    def device(self) -> torch.device:
        """Device of the computation: `device` if the dictionary is loaded in full, else the CPU."""
        return torch.device("cpu" if self._in_memory is None else self._device)

    @property
    def n_latents(self) -> int:
        """Width of the whole dictionary."""
        return self._config.n_latents

    def whole(self) -> Dictionary:
        """Return the whole dictionary in memory."""
        if self._in_memory is not None and self._axis.shards == 1:
            return self._in_memory
        return self._load(WHOLE)

    def _load(self, axis: LatentAxis) -> Dictionary:
        sae = build_sae(self._config, self._widths, axis, dtype=self._dtype)
        load_weights(sae, self._checkpoint, self._stored)
        return sae

    def pages(self, leave_out: Container[str] = ()) -> Iterator[Dictionary]:
        """Yield the pages in order. Each is overwritten by the page after the next.

        Args:
            leave_out: Names of tensors that are not needed. If the dictionary is loaded in full,
                this has no effect.
        """
        if self._in_memory is not None:
            yield self._in_memory
        else:
            yield from self._pages(leave_out)

    def parts(self, name: str) -> Iterator[Tensor]:
        """Yield parts of a tensor that has a row for every latent. Copy parts that you keep.

        For W_dec the parts are decoder rows, independent of its layout; see `decoder_rows`.
        """

        def rows(sae: Dictionary) -> Tensor:
            return (sae.decoder_rows() if name == "W_dec" else sae.get_parameter(name)).detach()

        if self._in_memory is not None:
            tensor = rows(self._in_memory)
            for shard in range(self._axis.shards):
                yield self._axis.broadcast_shard(tensor, shard).cpu()
            return
        for page in self._pages(self._per_latent - {name}):
            yield rows(page)

    def grouped(self, batches: Iterator[Rows]) -> Iterator[Rows]:
        """Join batches into larger ones, each for one pass over the pages.

        Batches are not joined if the dictionary is loaded in full. Each result is overwritten by
        the next.
        """
        if self._in_memory is not None:
            yield from batches
            return
        inputs, n = torch.empty(self._rows_per_pass, self._widths.d_in), 0
        joined = Rows(inputs, inputs)
        for batch in batches:
            if batch.targets is not batch.inputs and joined.targets is inputs:
                joined = Rows(inputs, torch.empty(self._rows_per_pass, self._widths.d_out))
            for piece in zip(*(torch.split(part, self._slice_rows) for part in batch), strict=True):
                fits = min(len(piece[0]), self._rows_per_pass - n)
                for part, new in zip(joined, piece, strict=True):
                    part[n : n + fits] = new[:fits]
                n += fits
                if n == self._rows_per_pass:
                    yield joined
                    n = len(piece[0]) - fits
                    for part, new in zip(joined, piece, strict=True):
                        part[:n] = new[fits:]
        if n:
            yield Rows(*(part[:n] for part in joined))

    @torch.no_grad()
    def encode_pages(self, x: Float[Tensor, "batch d_in"]) -> Iterator[EncodedPage]:
        """Yield every page, or this rank's shard, with its codes for a slice of rows at a time.

        The codes are those that the whole dictionary would compute. Pages come in order. All ranks
        must pass the same rows. Collective.
        """
        if self._in_memory is not None:
            for rows in _slices(x, SLICE_ROWS):
                yield self._in_memory, rows, self._in_memory.encode(x[rows])
            return
        largest = self._largest(x, self._row_limit) if self._row_limit else None
        for page in self._pages(() if largest is None else self._per_latent - self._decoder):
            latents = page.axis.latents(self.n_latents)
            for rows in _slices(x, self._slice_rows):
                yield (
                    page,
                    rows,
                    page.encode(x[rows]) if largest is None else largest.codes(rows, latents),
                )

    @torch.no_grad()
    def infer(self, x: Float[Tensor, "batch d_in"]) -> Inferred:
        """Compute the whole dictionary's reconstructions and firings; see `Dictionary.infer`.

        The results are on `device`.
        """
        x = x.to(self.device)
        if self._in_memory is not None:
            x_hat, fired = self._in_memory.infer(x)
            shards = [
                self._axis.broadcast_shard(fired, shard) for shard in range(self._axis.shards)
            ]
            return Inferred(x_hat, torch.cat(shards))
        largest = self._largest(x, self._row_limit) if self._row_limit else None
        x_hat = torch.zeros(len(x), self._widths.d_out, dtype=self._dtype)
        firings = [] if largest is None else [largest.firings(self.n_latents)]
        for page in self._pages(() if largest is None else self._per_latent - self._decoder):
            latents = page.axis.latents(self.n_latents)
            fired = torch.zeros(len(latents), dtype=torch.int32)
            for rows in _slices(x, self._slice_rows):
                if largest is None:
                    part, of_rows = page.infer_shard(x[rows])
                    fired += of_rows
                else:
                    part = page.decode_shard(largest.codes(rows, latents))
                x_hat[rows] += part if latents.start else part + page.offset(x[rows])
            if largest is None:
                firings.append(fired)
        return Inferred(x_hat, torch.cat(firings))

    def _largest(self, x: Tensor, limit: int) -> "_LargestCodes":
        largest = _LargestCodes(len(x), limit, self._dtype)
        for page in self._pages(self._decoder):
            for rows in _slices(x, self._slice_rows):
                largest.merge(rows, page.encode(x[rows]), page.first_latent)
        return largest

    def _pages(self, leave_out: Container[str]) -> Iterator[Dictionary]:
        """Yield the pages in order, and read the next page in the background.

        Each page is overwritten by the page after the next.
        """
        n_pages = -(-self.n_latents // self._page_latents)
        with ThreadPoolExecutor(1, "page") as reader:
            next_page = reader.submit(self._read, 0, leave_out)
            for number in range(1, n_pages):
                page, next_page = next_page.result(), reader.submit(self._read, number, leave_out)
                yield page
            yield next_page.result()

    def _read(self, number: int, leave_out: Container[str]) -> Dictionary:
        first = number * self._page_latents
        latents = range(first, min(first + self._page_latents, self.n_latents))
        with torch.device("meta"):
            page = build_sae(self._config, self._widths, PageAxis(page=latents), dtype=self._dtype)
        memory, tensors = self._memory[number % 2], {}
        for name, tensor in page.tensors():
            if name not in memory:  # the first page in this buffer, which is the largest
                memory[name] = torch.zeros(tensor.shape, dtype=tensor.dtype)
            tensors[name] = memory[name][: len(tensor)]
        page.load_state_dict(tensors, assign=True)
        load_weights(page, self._checkpoint, self._stored, leave_out)
        return page


class _LargestCodes:
    """The largest codes of each row over the pages so far.

    Args:
        rows: Number of rows.
        limit: Number of codes per row.
        dtype: Precision of the codes.
    """

    def __init__(self, rows: int, limit: int, dtype: torch.dtype) -> None:
        self._keys = torch.full((rows, limit), NO_ENTRY)
        self._acts = torch.zeros(rows, limit, dtype=dtype)

    def merge(self, rows: slice, codes: Codes, first: int) -> None:
        """Merge a page's codes for a slice of rows. `first` is the number of its first latent."""
        limit = self._keys.shape[1]
        entries = Entries(codes.latents, codes.starts, 0)
        places = torch.arange(len(codes.acts)) - codes.starts[entries.rows]
        keys = torch.full((len(codes.starts), limit), NO_ENTRY)
        acts = torch.zeros(len(codes.starts), limit, dtype=self._acts.dtype)
        keys[entries.rows, places] = to_keys(codes.acts, codes.latents + first)
        acts[entries.rows, places] = codes.acts
        keys = torch.cat([self._keys[rows], keys], 1)
        self._keys[rows], chosen = keys.topk(limit, dim=1, sorted=False)
        self._acts[rows] = torch.cat([self._acts[rows], acts], 1).gather(1, chosen)

    def codes(self, rows: slice, latents: range) -> Codes:
        """Return the codes of a slice of rows and a range of latents, numbered from its first."""
        keys = self._keys[rows]
        which = from_keys(keys)[1]
        here = (keys > NO_ENTRY) & (which >= latents.start) & (which < latents.stop)
        counts = here.sum(1)
        return Codes(self._acts[rows][here], which[here] - latents.start, counts.cumsum(0) - counts)

    def firings(self, n_latents: int) -> Tensor:
        """Count the rows on which each latent is active."""
        fired = torch.zeros(n_latents, dtype=torch.int32)
        for rows in _slices(self._keys, SLICE_ROWS):
            latents = from_keys(self._keys[rows])[1][self._acts[rows] > 0]
            fired += torch.bincount(latents, minlength=n_latents)
        return fired


def _slices(x: Tensor, rows: int) -> Iterator[slice]:
    for start in range(0, len(x), rows):
        yield slice(start, start + rows)


def _page_latents(config: SaeConfig, fitting: int) -> int:
    """Return the latents per page if `fitting` fit in memory.

    It is a multiple of a chunk, or of the latents that must stay together (`config.group_size`).
    """
    unit = config.group_size
    if unit == 1 and fitting >= select.CHUNK_LATENTS:
        unit = select.CHUNK_LATENTS
    return max(1, fitting // unit) * unit
