"""Stage 1 of an index: encoding units.

With a dictionary sharded over ranks, each rank contributes its share of a block's rows. Every row
meets every latent, as in training, and each rank gets the codes of its own latents.
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from dist_sae.checkpoint.state import load_weights
from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.shard import SiteRows, SiteShard, read_block
from dist_sae.dictionaries import build_sae
from dist_sae.dictionaries.axis import LatentAxis
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.normaliser import SiteNormalisers
from dist_sae.index.codes import rounded
from dist_sae.index.context import IndexContext
from dist_sae.kernels import Entries, select
from dist_sae.kernels.choice import choose_kernels

ENCODE_ROWS = 4096
"""Most rows that are encoded at a time."""
_BLOCKS_AHEAD = 2
_MOST_READERS = 8


class Encoded(NamedTuple):
    """An encoded unit, with the codes of this rank's latents."""

    unit: int
    origin: tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]
    """Token, position and document of each row."""
    sums: tuple[float, float, int]
    """Sums over all ranks: squared error, squared distance from the mean, and active latents."""
    latents: NDArray[np.int32]
    """Latent of each entry, counted from this rank's first latent. Entries are sorted by row."""
    rows: NDArray[np.int32]
    acts: NDArray[np.float32]


_Block = dict[str, Future[SiteRows]]
"""A block of rows that is being read, one future per site."""


class _OpenedUnit(NamedTuple):
    """A unit whose first blocks are being read."""

    shards: dict[str, SiteShard]
    blocks: deque[_Block]


class Encoder:
    """Encodes units with a trained dictionary. Leaving its `with` block stops the read-ahead.

    Args:
        sae: The dictionary, or this rank's shard of it.
        activations: The activation set at the dictionary's sites.
        normalisers: The normalisers of these sites.
    """

    def __init__(
        self, sae: Dictionary, activations: ActivationSet, normalisers: SiteNormalisers
    ) -> None:
        self.sae = sae
        self._closed = threading.Event()
        self._activations = activations.with_closed_event(self._closed)
        self._normalisers = normalisers
        self._row_multiple = math.lcm(select.ROW_ALIGNMENT, sae.axis.shards)
        readers = min(len(normalisers.by_site), _MOST_READERS)
        # one more thread than readers, since `_open_unit` may wait in one until a unit is produced
        self._pool = ThreadPoolExecutor(1 + readers, "blocks")
        self._opened_units: dict[int, Future[_OpenedUnit]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._pool.shutdown(cancel_futures=True)

    @torch.no_grad()
    def encode(
        self,
        unit: int,
        alive: Callable[[], None] = lambda: None,
        claim_next: Callable[[], int | None] = lambda: None,
    ) -> Encoded:
        """Encode a unit. Collective.

        Args:
            unit: Number of the unit.
            alive: Called before each block.
            claim_next: Called before the last block is encoded. Returns the next unit, whose first
                blocks are then read ahead, or None if it is not known.

        Raises:
            ObjectNotFoundError: The unit does not exist.
            CorruptObjectError: A block is damaged, or was deleted.
        """
        opened = self._opened_units.pop(unit, None)
        shards, blocks = opened.result() if opened else self._open_unit(unit)
        device = self.sae.b_dec.device
        none = torch.empty(0, dtype=torch.int32)  # a unit may have no rows
        origins = [(none, none, none.long())]
        found, n_rows = [(none.to(device), none.to(device), none.to(device).float())], 0
        error = torch.zeros((), dtype=torch.float64, device=device)
        for sites in self._read(shards, blocks, claim_next):
            alive()
            origins.append(next(iter(sites.values()))[1:])
            pieces = {site: torch.split(rows.acts, ENCODE_ROWS) for site, rows in sites.items()}
            for piece in zip(*pieces.values(), strict=True):
                acts = dict(zip(pieces, piece, strict=True))
                entries, more = self._encode(acts)
                error += more
                found.append((entries[0], entries[1] + n_rows, entries[2]))
                n_rows += len(piece[0])
        latents, rows, values = (
            torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True)
        )
        tokens, positions, documents = (
            torch.cat(parts).numpy() for parts in zip(*origins, strict=True)
        )
        sums = torch.stack([error, error.new_tensor(float(len(values)))])
        squared_error, active = self.sae.axis.total(sums).tolist()
        return Encoded(
            unit,
            (tokens, positions, documents),
            (squared_error, self._squared_total(shards, n_rows), int(active)),
            latents,
            rows,
            rounded(values),
        )

    def _encode(
        self, acts: Mapping[str, Tensor]
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Float[Tensor, ""]]:
        """Encode rows.

        Returns:
            The entries of this rank's latents as (latents, rows, acts), and the squared error
            summed over this rank's share of the rows.
        """
        sae, axis = self.sae, self.sae.axis
        scaled = self._normalisers.rows(acts, sae.b_dec.device)
        n = len(scaled.inputs)
        padded = n + -n % self._row_multiple
        each = padded // axis.shards
        own = slice(axis.shard * each, (axis.shard + 1) * each)
        x = functional.pad(scaled.inputs, (0, 0, 0, padded - n))[own]
        codes = sae.encode(x)
        n_own = max(0, min(n - own.start, each))  # later rows are padding
        error = sae.decode(codes, x)[:n_own].sub_(scaled.targets[own])
        rows = Entries(codes.latents, codes.starts, len(sae.W_enc)).rows
        on = (codes.acts > 0) & (rows < n)
        latents, rows = codes.latents[on], rows[on]
        squares = torch.linalg.vector_norm(error, dim=1).double().square().sum()
        return (latents.int(), rows.int(), codes.acts[on].float()), squares

    def _squared_total(self, shards: Mapping[str, SiteShard], rows: int) -> float:
        """Compute the sum of |y - mean|^2 over a unit's targets from the sums in its manifest."""
        total = 0.0
        for site in self._normalisers.writes:
            scale, mean = (
                self._normalisers.by_site[site].scale,
                self._normalisers.by_site[site].mean,
            )
            along = float(torch.tensor(shards[site].sum, dtype=torch.float64) @ mean)
            squares = scale**2 * shards[site].sum_squares
            total += squares - 2 * scale * along + rows * float(mean.square().sum())
        return total

    def _open_unit(self, unit: int) -> _OpenedUnit:
        """Find a unit's shards, and start to read their first blocks."""
        shards = self._activations.shards(self._activations.manifest(unit))
        numbers = range(_n_blocks(shards))[:_BLOCKS_AHEAD]
        return _OpenedUnit(shards, deque(self._submit(shards, number) for number in numbers))

    def _submit(self, shards: Mapping[str, SiteShard], number: int) -> _Block:
        pool, store = self._pool, self._activations.store
        return {s: pool.submit(read_block, store, shard, number) for s, shard in shards.items()}

    def _read(
        self,
        shards: Mapping[str, SiteShard],
        ahead: deque[_Block],
        claim_next: Callable[[], int | None],
    ) -> Iterator[dict[str, SiteRows]]:
        """Yield each block with the rows of all sites, reading ahead into the next unit."""
        n_blocks = _n_blocks(shards)
        for number in range(n_blocks):
            if number + _BLOCKS_AHEAD < n_blocks:
                ahead.append(self._submit(shards, number + _BLOCKS_AHEAD))
            block = {site: rows.result() for site, rows in ahead.popleft().items()}
            if number == n_blocks - 1 and (unit := claim_next()) is not None:
                self._opened_units = {unit: self._pool.submit(self._open_unit, unit)}
            yield block


def _n_blocks(shards: Mapping[str, SiteShard]) -> int:
    return len(next(iter(shards.values())).blocks)


def open_encoder(
    context: IndexContext, axis: LatentAxis, device: torch.device, stopping: threading.Event
) -> Encoder:
    """Load the dictionary of an index, or this rank's shard of it, into an encoder.

    Args:
        context: The index.
        axis: This rank's place among the ranks that share the dictionary.
        device: Device of the dictionary.
        stopping: When set, stops waiting for units that are not produced yet.
    """
    run, normalisers = context.run, context.normalisers
    kernels = choose_kernels("auto", device)
    sae = build_sae(run.sae, normalisers.widths, axis, kernels).to(device)
    load_weights(sae, context.checkpoint)
    activations = ActivationSet(
        context.activations,
        context.plan,
        run.sites,
        stopping,
        patience_seconds=float(run.timeouts.missing_seconds),
    )
    return Encoder(sae.eval(), activations, normalisers)
