"""Selections from blocks of products, almost without waiting for the device to count them.

Candidates go to buffers of a fixed size, one block's behind the other's, at places that the device
counts. If they do not fit, which is rare, the products are computed again.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dist_sae.kernels import select
from dist_sae.kernels.select import Block, Candidates

_SLACK = 4  # room for candidates, over the number that is expected
LEAST_ROOM = 4096
"""Room for candidates of a block, at least."""
_LOOKED_AT = 1 / 8  # of the entries, before the first look at how many they are


class _Found:
    """Candidates in buffers on the device.

    Args:
        like: A tensor of the values' type, on the device.
        room: Candidates in all.
        of_block: Candidates of a block, at most.
    """

    def __init__(self, like: Tensor, room: int, of_block: int) -> None:
        device, size = like.device, room + of_block  # the last block may begin at the end
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
        most: int,
    ) -> None:
        """Add the chosen entries of a block, `most` of them at most."""
        most = min(most, chosen.numel())
        places = chosen.flatten().nonzero_static(size=most, fill_value=0)[:, 0]
        count = chosen.sum()
        # what lies behind the count is nothing yet, and is written over by the next block
        into = self._count.clamp(max=self._room) + torch.arange(most, device=places.device)
        self._values[into], self._rows[into], self._latents[into] = _at(places, block, pre_acts)
        self._count += count
        self._counts.append(count)
        self._too_many |= (count > most) | (self._count > self._room)

    def keep_largest(self, count: int) -> Tensor:
        """Keep the `count` largest and what equals the least of them; return this one."""
        is_there = torch.arange(len(self._values), device=self._values.device) < self._count
        values = self._values.where(is_there, -torch.inf)
        bound = select.kth(values, count)
        kept = is_there & (values >= bound)
        places = kept.nonzero_static(size=len(values), fill_value=0)[:, 0]
        self._values, self._rows, self._latents = (
            part[places] for part in (self._values, self._rows, self._latents)
        )
        self._count = kept.sum()
        return bound

    def read(self) -> Candidates | None:
        """The candidates, or None if there were too many. The host waits once."""
        count, too_many = torch.stack([self._count, self._too_many.long()]).tolist()
        return None if too_many else self.first(count)

    def counts(self) -> list[int]:
        """Numbers of the chosen entries of each block. The host waits once."""
        return _read(self._counts)

    def first(self, count: int) -> Candidates:
        """The first `count` candidates."""
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
    """`select.above`. The host waits once if there are about as many as before, else twice at most.

    What does not fit into the room for as many as before is computed again: then the number of each
    block's entries is known. So it is where `share` is not given. These are counted first, and only
    in a part of the blocks if they are already too many there.

    Args:
        blocks: Computes x W_enc^T, chunk after chunk.
        b_enc: Encoder bias.
        bound: Bound of each latent.
        size: Entries of x W_enc^T.
        share: Share of the entries that were above their bound before, if that is known.
        limit: Give up when there are more than this many.
    """
    found, of_block = None, 0
    if share is None:
        counts = _counted(_over(blocks(), b_enc, bound), size, limit)
    else:
        for block, pre_acts, chosen in _over(blocks(), b_enc, bound):
            if found is None:  # the blocks behind the first are no larger
                of_block = int(_SLACK * share * pre_acts.numel()) + LEAST_ROOM
                found = _Found(b_enc, limit, of_block)
            found.add(block, pre_acts, chosen, of_block)
        counts = found.counts() if found else []
    if sum(counts) > limit:
        return None
    if found and max(counts) <= of_block:
        return select.by_row(found.first(sum(counts)))
    parts = [select.nothing(b_enc)]
    for (block, pre_acts, chosen), count in zip(_over(blocks(), b_enc, bound), counts, strict=True):
        places = select.places_of(chosen.flatten(), count)
        parts.append(_at(places, block, pre_acts))
    return select.by_row(Candidates(*map(torch.cat, zip(*parts, strict=True))))


def _over(
    blocks: Iterable[Block], b_enc: Tensor, bound: Tensor
) -> Iterator[tuple[Block, Tensor, Tensor]]:
    """Each block with its pre-activations, and which of these exceed their bound."""
    for block in blocks:
        pre_acts = block.products + b_enc[block.latents]
        yield block, pre_acts, pre_acts > bound[block.latents]


def _at(places: Tensor, block: Block, pre_acts: Tensor) -> Candidates:
    """The entries of a block at places of its flattened matrix."""
    rows, columns = places // pre_acts.shape[1], places % pre_acts.shape[1]
    return Candidates(pre_acts.flatten()[places], rows + block.rows.start, block.latents[columns])


def _counted(over: Iterable[tuple[Block, Tensor, Tensor]], size: int, limit: int) -> list[int]:
    """Numbers of the chosen entries of each block, or of the first ones if those are too many."""
    counts, seen, looked = list[Tensor](), 0, False
    for _, pre_acts, chosen in over:
        counts.append(chosen.sum())
        seen += pre_acts.numel()
        if not looked and seen >= _LOOKED_AT * size:
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
    """`select.largest`, or None if there was too little room. The host waits once.

    The bound rises after 1, 2, 4, 8 blocks and so on: where these are alike, as many candidates are
    met until it rises as are kept.

    Args:
        blocks: x W_enc^T, chunk after chunk.
        b_enc: Encoder bias.
        count: From 1.
    """
    room = _SLACK * count + LEAST_ROOM
    found = _Found(b_enc, room, room)
    bound = least = b_enc.new_zeros(())
    risen_at = 0
    for number, block in enumerate(blocks, 1):
        if block.opens:  # see `select.largest`
            least = bound
        pre_acts = block.products + b_enc[block.latents]
        chosen = (pre_acts > least) & (pre_acts >= bound)
        if number == 1 and pre_acts.numel() > count:
            reached = select.reached_by(pre_acts, count)
            chosen &= pre_acts >= (select.kth(pre_acts, count) if reached is None else reached)
        found.add(block, pre_acts, chosen, _SLACK * count // max(1, risen_at) + LEAST_ROOM)
        if number >= 2 * risen_at:
            bound, risen_at = torch.maximum(bound, found.keep_largest(count)), number
    found.keep_largest(count)
    return found.read()
