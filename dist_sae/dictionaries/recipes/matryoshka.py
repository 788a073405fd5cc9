"""Matryoshka BatchTopK (Bussmann et al. 2025, arXiv:2503.17547): each prefix is also a dictionary.

    f       as with BatchTopK (topk.py), over all latents
    x_hat_m = sum over the latents i of prefix m of f_i W_dec_i  +  b_dec
    L       = sum_m w_m E|x - x_hat_m|^2 / Var(x)  +  alpha L_aux            (auxk.py)

The last prefix is the whole dictionary, and AuxK uses its error. The weights w_m are not
normalized. Each is 1 by default, as published, so that the weight of AuxK relative to the error of
the whole dictionary does not depend on the number of prefixes.

Prefixes are not the first latents, because these fire most, and all would be on one shard. Instead,
prefixes repeat with a period P, the smallest with a whole number of latents of each prefix. Latent
i is in prefix m if i mod P is below P n_m / n, where n_m of the n latents are in the prefix
(`MatryoshkaConfig.prefix_pattern`). So every shard has the same share of each prefix, and the
result does not depend on the number of shards.

Each entry is decoded once, in the group of the smallest prefix that contains it. x_hat_m is the sum
of the first m groups. A group's gradient is the weighted sum of the errors of all prefixes that
contain it.
"""

from typing import Any

import torch

from dist_sae.config.matryoshka import MatryoshkaConfig
from dist_sae.dictionaries.interface import Products, Selected, Widths
from dist_sae.dictionaries.recipes.topk import TopK
from dist_sae.kernels import Entries, starts_of


class Matryoshka(TopK):
    """BatchTopK whose loss is summed over prefixes of the dictionary."""

    config: MatryoshkaConfig

    def __init__(
        self, config: MatryoshkaConfig, widths: Widths | int, *place: Any, **precision: Any
    ) -> None:
        super().__init__(config, widths, *place, **precision)
        self.loss_weights = config.weights
        self.main_index = len(self.loss_weights) - 1

    def groups(self, products: Products, k: int) -> list[Selected]:
        values, entries = self.selection.select(products, k)
        ends = self.config.prefix_pattern
        places = (entries.latents + self.first_latent) % ends[-1]
        numbers = torch.zeros_like(places, dtype=torch.int32)
        for end in ends:
            numbers += places >= end
        in_order, order = numbers.sort(stable=True)
        counts: list[int] = starts_of(in_order, len(ends) + 1).diff().tolist()
        found = []
        for here in torch.split(order, counts):
            starts = starts_of(entries.rows[here], len(entries.starts))
            chosen = Entries(entries.latents[here], starts, entries.n_latents)
            found.append((values[here], chosen))
        return found
