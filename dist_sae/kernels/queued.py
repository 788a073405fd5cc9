"""Selections from blocks of products that never wait for the device: how many only it knows.

Candidates go to buffers of a fixed size, one block's behind the other's, at places that the device
counts. Where they do not fit, which is rare, the result is None, and `select` does it again with a
wait for each block.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dist_sae.kernels import select
from dist_sae.kernels.select import Block, Candidates

_SLACK = 4  # room for candidates, over the number that is expected
_LEAST_ROOM = 4096  # candidates of a block


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
        self._values[into] = pre_acts.flatten()[places]
        self._rows[into] = places // chosen.shape[1] + block.rows.start
        self._latents[into] = block.latents[places % chosen.shape[1]]
        self._count += count
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
        if too_many:
            return None
        return Candidates(self._values[:count], self._rows[:count], self._latents[:count])


def above(
    blocks: Iterable[Block],
    b_enc: Float[Tensor, " n_latents"],
    bound: Float[Tensor, " n_latents"],
    *,
    share: float,
    limit: int,
) -> Candidates | None:
    """`select.above`, if there are about as many as before.

    Args:
        blocks: x W_enc^T, chunk after chunk.
        b_enc: Encoder bias.
        bound: Bound of each latent.
        share: Share of the entries that were above their bound before.
        limit: Give up when there are more than this many.
    """
    found, of_block = None, 0
    for block in blocks:
        pre_acts = block.products + b_enc[block.latents]
        if found is None:  # the blocks behind the first are no larger
            of_block = int(_SLACK * share * pre_acts.numel()) + _LEAST_ROOM
            found = _Found(b_enc, limit, of_block)
        found.add(block, pre_acts, pre_acts > bound[block.latents], of_block)
    candidates = found.read() if found else None
    return None if candidates is None else select.by_row(candidates)


def largest(
    blocks: Iterable[Block], b_enc: Float[Tensor, " n_latents"], count: int
) -> Candidates | None:
    """`select.largest`.

    The bound rises after 1, 2, 4, 8 blocks and so on: where these are alike, as many candidates are
    met until it rises as are kept.

    Args:
        blocks: x W_enc^T, chunk after chunk.
        b_enc: Encoder bias.
        count: From 1.
    """
    room = _SLACK * count + _LEAST_ROOM
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
        found.add(block, pre_acts, chosen, _SLACK * count // max(1, risen_at) + _LEAST_ROOM)
        if number >= 2 * risen_at:
            bound, risen_at = torch.maximum(bound, found.keep_largest(count)), number
    found.keep_largest(count)
    return found.read()
