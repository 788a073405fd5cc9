"""Rows that nobody trains on."""

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor

from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.shard import manifest_key, read_block


def rows_of(
    units: ActivationSet, numbers: range, limit: int
) -> Iterator[Float[Tensor, "rows d_in"]]:
    """Activations of whole units, in fp32, block by block, `limit` rows at most."""
    for number in numbers:
        shard = units.shard(units.manifest(number))
        for block in range(len(shard.blocks)):
            if limit <= 0:
                return
            acts = read_block(units.store, shard, block).acts[:limit]
            limit -= len(acts)
            yield acts.float()


def are_there(units: ActivationSet, numbers: range) -> bool:
    """Whether all of these units have been produced."""
    return all(units.store.size(manifest_key(number)) is not None for number in numbers)
