"""Batches of rows from an activation set."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.consumers import retired_below
from dist_sae.data.shard import existing_units, read_block
from dist_sae.errors import (
    ArgumentError,
    CorruptObjectError,
    DataExhaustedError,
    UnitMissingError,
)

logger = logging.getLogger(__name__)


class RowBatch(NamedTuple):
    """Raw activations, with the token, document and unit of each row."""

    acts: Float[Tensor, "batch d_in"]
    """Raw activations in fp32, concatenated over sites."""
    tokens: Int[Tensor, " batch"]
    positions: Int[Tensor, " batch"]
    """Token position within the document."""
    documents: Int[Tensor, " batch"]
    """Number of the document within the corpus."""
    units: Int[Tensor, " batch"]
    rows: Int[Tensor, " batch"]
    """Row number within the unit. Unit and row number together identify a row."""

    def numpy(self) -> dict[str, NDArray[Any]]:
        """Return the columns as NumPy arrays, by name."""
        return {name: column.numpy() for name, column in self._asdict().items()}


def find_units(
    activations: ActivationSet, units: int | Iterable[int] | None, *, heldout: bool
) -> list[int]:
    """Find the units to read. By default these are all existing training or held-out units.

    Args:
        activations: The activation set.
        units: Numbers of the units, or None for the default.
        heldout: By default, read the held-out units instead of the training units.

    Raises:
        ArgumentError: A unit is not in the plan.
        DataExhaustedError: A unit's rows were deleted after use.
        UnitMissingError: A unit has not been produced.
    """
    store, plan = activations.store, activations.plan
    there = set(existing_units(store))
    if units is not None:
        chosen = [units] if isinstance(units, int) else list(units)
        for unit in chosen:
            if not 0 <= unit < len(plan.units):
                raise ArgumentError(
                    f"unit {unit}: {store.url} has units 0 to {len(plan.units) - 1}"
                )
            _check_kept(activations, unit)
            if unit not in there:
                raise UnitMissingError(
                    f"{store.url}: unit {unit} has not been produced; run `dist-sae produce`"
                )
        return chosen
    part = plan.heldout_units if heldout else plan.train_units
    below = 0 if heldout else min(retired_below(store), len(part))
    found = [unit for unit in part[below:] if unit in there]
    name = "held-out" if heldout else "training"
    if not found:
        raise UnitMissingError(
            f"{store.url}: none of {len(part)} {name} units exist ({below} deleted after use); "
            f"run `dist-sae produce`"
        )
    if len(found) < len(part):
        logger.warning(
            "%s: reading %d of %d %s units: %d were deleted after use, %d are not produced yet",
            store.url,
            len(found),
            len(part),
            name,
            below,
            len(part) - below - len(found),
        )
    return found


def read_rows(
    activations: ActivationSet, units: Sequence[int], batch_rows: int | None, limit: int | None
) -> Iterator[RowBatch]:
    """Yield the rows of units in order.

    Args:
        activations: The activation set.
        units: Units from `find_units`.
        batch_rows: Rows per batch; the last batch may have fewer. None: one batch per unit.
        limit: Maximum number of rows. None: no limit.
    """
    left = limit
    held: list[RowBatch] = []
    n_held = 0
    for unit in units:
        for block in _blocks(activations, unit):
            part = block if left is None else _cut(block, 0, left)
            left = left if left is None else left - len(part.acts)
            held.append(part)
            n_held += len(part.acts)
            if batch_rows and n_held >= batch_rows:
                whole, stop = _joined(held), n_held - n_held % batch_rows
                for start in range(0, stop, batch_rows):
                    yield _cut(whole, start, start + batch_rows)
                held, n_held = [_cut(whole, stop, n_held)], n_held - stop
            if left == 0:
                break
        if n_held and (batch_rows is None or left == 0):
            yield _joined(held)
            held, n_held = [], 0
        if left == 0:
            return
    if n_held:
        yield _joined(held)


def _blocks(activations: ActivationSet, unit: int) -> Iterator[RowBatch]:
    shards = activations.shards(activations.manifest(unit))
    first = 0
    for number, block in enumerate(shards[activations.sites[0]].blocks):
        try:
            found = [read_block(activations.store, shard, number) for shard in shards.values()]
        except CorruptObjectError:
            _check_kept(activations, unit)  # a trainer may have just deleted it
            raise
        rows = torch.arange(first, first + block.rows)
        acts = torch.cat([of_site.acts.float() for of_site in found], 1)
        yield RowBatch(acts, *found[0][1:], torch.full_like(rows, unit), rows)
        first += block.rows


def _check_kept(activations: ActivationSet, unit: int) -> None:
    below = retired_below(activations.store)
    if unit < below:
        raise DataExhaustedError(
            f"{activations.store.url}: the rows of unit {unit} were deleted after use "
            f"(store.retention: delete_consumed); units from {below} on still exist"
        )


def _cut(rows: RowBatch, start: int, stop: int) -> RowBatch:
    return RowBatch(*(column[start:stop] for column in rows))


def _joined(parts: list[RowBatch]) -> RowBatch:
    return RowBatch(*map(torch.cat, zip(*parts, strict=True)))
