"""Selections from blocks of products with almost no host-device synchronization.

Candidates are appended to buffers of a fixed size, at offsets that the device computes. In the rare
case that they do not fit, the products are computed again.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dist_sae.kernels import select
from dist_sae.kernels.select import Block, Candidates

_SLACK = 4  # room for candidates, divided by the expected number
MIN_ROOM = 4096
"""Minimum room for a block's candidates."""
_FIRST_LOOK_SHARE = 1 / 8  # share of the entries to examine before counts are first read


class _CandidateBuffer:
    """Candidates in buffers on the device.

    Args:
        like: A tensor on the device with the values' dtype.
        room: Room for candidates in total.
        of_block: Room for one block's candidates.
    """

    def __init__(self, like: Tensor, room: int, of_block: int) -> None:
        device, size = like.device, room + of_block  # the last block may start at the end
        self._room = room
        self._values = like.new_zeros(size)
        self._rows, self._latents = torch.zeros(2, size, dtype=torch.int64, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._too_many = torch.zeros((), dtype=torch.bool, device=device)
        self._counts = list[Tensor]()

    def add(
        self,
        block: Block,
        pre_acts: Float[Tensor, "rows chunk"],
        chosen: Bool[Tensor, "rows chunk"],
        max_count: int,
    ) -> None:
        """Append at most `max_count` of the chosen entries of a block."""
        max_count = min(max_count, chosen.numel())
        places = chosen.flatten().nonzero_static(size=max_count, fill_value=0)[:, 0]
        count = chosen.sum()
        # entries past `count` are padding, which the next block overwrites
        into = self._count.clamp(max=self._room) + torch.arange(max_count, device=places.device)
        self._values[into], self._rows[into], self._latents[into] = _entries_at(
            places, block, pre_acts
        )
        self._count += count
        self._counts.append(count)
        self._too_many |= (count > max_count) | (self._count > self._room)

    def keep_largest(self, count: int) -> Tensor:
        """Drop all but the `count` largest and ties of the smallest kept. Return the smallest."""
        is_there = torch.arange(len(self._values), device=self._values.device) < self._count
        values = self._values.where(is_there, -torch.inf)
        bound = select.kth_largest(values, count)
        kept = is_there & (values >= bound)
        places = kept.nonzero_static(size=len(values), fill_value=0)[:, 0]
        self._values, self._rows, self._latents = (
            part[places] for part in (self._values, self._rows, self._latents)
        )
        self._count = kept.sum()
        return bound

    def read(self) -> Candidates | None:
        """Return the candidates, or None if there were too many. One host sync."""
        count, too_many = torch.stack([self._count, self._too_many.long()]).tolist()
        return None if too_many else self.first(count)

    def counts(self) -> list[int]:
        """Return the number of chosen entries in each block. One host sync."""
        return _read(self._counts)

    def first(self, count: int) -> Candidates:
        """Return the first `count` candidates."""
        return Candidates(self._values[:count], self._rows[:count], self._latents[:count])


def above(
    blocks: Callable[[], Iterable[Block]],
    b_enc: Float[Tensor, " n_latents"],
    bound: Float[Tensor, " n_latents"],
    *,
    size: int,
    share: float | None,
    limit: int,
) -> Candidates | None:
    """Select like `select.above`, with one host sync if the count is similar to before, else two.

    With `share`, buffers are allocated for about as many entries as before. If a block's entries do
    not fit, the products are computed again, this time with known counts per block. Without
    `share`, a first pass only counts the entries. It ends early if the first blocks already exceed
    the limit.

    Args:
        blocks: Computes x W_enc^T, chunk by chunk.
        b_enc: Encoder bias.
        bound: Bound of each latent.
        size: Number of entries of x W_enc^T.
        share: Share of the entries that exceeded their bound the last time, if known.
        limit: Largest number of entries. Return None if there are more.
    """
    found, of_block = None, 0
    if share is None:
        counts = _count_chosen(_above_bound(blocks(), b_enc, bound), size, limit)
    else:
        for block, pre_acts, chosen in _above_bound(blocks(), b_enc, bound):
            if found is None:  # later blocks are no larger than the first
                of_block = int(_SLACK * share * pre_acts.numel()) + MIN_ROOM
                found = _CandidateBuffer(b_enc, limit, of_block)
            found.add(block, pre_acts, chosen, of_block)
        counts = found.counts() if found else []
    if sum(counts) > limit:
        return None
    if found and max(counts) <= of_block:
        return select.by_row(found.first(sum(counts)))
    parts = [select.no_candidates(b_enc)]
    for (block, pre_acts, chosen), count in zip(
        _above_bound(blocks(), b_enc, bound), counts, strict=True
    ):
        places = select.true_indices(chosen.flatten(), count)
        parts.append(_entries_at(places, block, pre_acts))
    return select.by_row(Candidates(*map(torch.cat, zip(*parts, strict=True))))


def _above_bound(
    blocks: Iterable[Block], b_enc: Tensor, bound: Tensor
) -> Iterator[tuple[Block, Tensor, Tensor]]:
    """Yield each block with its pre-activations and the mask of those that exceed their bound."""
    for block in blocks:
        pre_acts = block.products + b_enc[block.latents]
        yield block, pre_acts, pre_acts > bound[block.latents]


def _entries_at(places: Tensor, block: Block, pre_acts: Tensor) -> Candidates:
    """Return a block's entries at indices into its flattened matrix."""
    rows, columns = places // pre_acts.shape[1], places % pre_acts.shape[1]
    return Candidates(pre_acts.flatten()[places], rows + block.rows.start, block.latents[columns])


def _count_chosen(over: Iterable[tuple[Block, Tensor, Tensor]], size: int, limit: int) -> list[int]:
    """Count each block's chosen entries. Stop early if the first blocks already have too many."""
    counts, seen, looked = list[Tensor](), 0, False
    for _, pre_acts, chosen in over:
        counts.append(chosen.sum())
        seen += pre_acts.numel()
        if not looked and seen >= _FIRST_LOOK_SHARE * size:
            looked = True
            if sum(so_far := _read(counts)) > limit:
                return so_far
    return _read(counts)


def _read(counts: Sequence[Tensor]) -> list[int]:
    numbers: list[int] = torch.stack(list(counts)).tolist() if counts else []
    return numbers


def largest(
    blocks: Iterable[Block], b_enc: Float[Tensor, " n_latents"], count: int
) -> Candidates | None:
    """Select like `select.largest`, but return None if there was too little room. One host sync.

    The bound is raised after 1, 2, 4, 8, ... blocks. If blocks are similar, about as many new
    candidates are added between two raises as are kept.

    Args:
        blocks: x W_enc^T, chunk by chunk.
        b_enc: Encoder bias.
        count: Number of entries to select, at least 1.
    """
    room = _SLACK * count + MIN_ROOM
    found = _CandidateBuffer(b_enc, room, room)
    bound = least = b_enc.new_zeros(())
    raised_at = 0
    for number, block in enumerate(blocks, 1):
        if block.starts_new_range:  # see `select.largest`
            least = bound
        pre_acts = block.products + b_enc[block.latents]
        chosen = (pre_acts > least) & (pre_acts >= bound)
        if number == 1 and pre_acts.numel() > count:
            reached = select.kth_lower_bound(pre_acts, count)
            chosen &= pre_acts >= (
                select.kth_largest(pre_acts, count) if reached is None else reached
            )
        found.add(block, pre_acts, chosen, _SLACK * count // max(1, raised_at) + MIN_ROOM)
        if number >= 2 * raised_at:
            bound, raised_at = torch.maximum(bound, found.keep_largest(count)), number
    found.keep_largest(count)
    return found.read()
