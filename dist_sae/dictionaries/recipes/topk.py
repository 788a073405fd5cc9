"""TopK (Gao et al. 2024, arXiv:2406.04093) and BatchTopK (Bussmann et al. 2024, arXiv:2412.06410).

    z     = W_enc (x - b_dec) + b_enc
    f     = relu(TopK_k(z)),  or (BatchTopK) relu(z) where it is among the (rows * k) largest of the
            global batch, else 0
    x_hat = W_dec^T f + b_dec
    L     = E|x - x_hat|^2 / Var(x)  +  alpha L_aux            (auxk.py)

With BatchTopK, a row has k active latents on average, and in training its codes depend on the other
rows of the batch. At inference they do not: f = z where z > theta, the running mean of the smallest
f kept in a batch. Decoder rows have unit norm, so that z alone ranks the latents. The component of
the gradient along the decoder row is removed.

Multi-TopK (Gao et al.; `multi_factor`) adds w E|x - x_hat_mk|^2 / Var(x), where x_hat_mk is decoded
from the m k largest z of a row. Its entries are those of x_hat and m k - k more, and each is
decoded once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dist_sae.config.dictionary import BatchSelectionConfig, KSelectionConfig
from dist_sae.config.sae import TopKConfig
from dist_sae.dictionaries.auxk import WithAuxK, auxk_loss
from dist_sae.dictionaries.base import firings
from dist_sae.dictionaries.interface import (
    LossTerms,
    Output,
    Products,
    Rows,
    Selected,
    StepContext,
    Widths,
)
from dist_sae.dictionaries.schedules import annealed
from dist_sae.dictionaries.selection import BatchTopK, RowTopK
from dist_sae.kernels import Entries


class TopK(WithAuxK):
    """A dictionary with the k largest pre-activations per row, in each row or over the batch."""

    selection: RowTopK | BatchTopK
    loss_weights: Sequence[float] = (1.0,)
    """Loss weights of the nested reconstructions; see `groups`."""
    main_index: int = 0
    """Index of the nested reconstruction that is x_hat."""
    _factors: Sequence[int] = (1,)  # latents per row in each nested reconstruction, over k

    def __init__(
        self,
        config: KSelectionConfig,
        widths: Widths | int,
        *place: Any,
        **precision: Any,
    ) -> None:
        super().__init__(config, widths, *place, **precision)
        self.selection = self.by_row = RowTopK(self, config.k, self.axis)
        if config.selects_over_batch:
            assert isinstance(config, BatchSelectionConfig)
            self.selection = BatchTopK(self, config.threshold_decay)
        elif isinstance(config, TopKConfig) and config.multi_factor:
            self._factors = (1, config.multi_factor)
            self.loss_weights = (1.0, config.multi_weight)

    def groups(self, products: Products, k: int) -> list[Selected]:
        """Select in groups. The n-th nested reconstruction is the sum of the first n groups."""
        if isinstance(self.selection, RowTopK):
            return self.selection.select_nested(products, [n * k for n in self._factors])
        return [self.selection.select(products, k)]

    def objective(self, rows: Rows, context: StepContext) -> Output:
        config = self.config
        k = annealed(context.progress, config.k, config.k_start, config.k_anneal_share)
        centre, offset = self.biases(rows.inputs)
        centred = self.centred(self.axis.gather(rows.inputs), centre)
        groups = self.groups(self.products(centred, self.product_dtype), k)
        selected = list(groups)
        if config.auxk and context.n_dead:
            selected.append(self.select_among(context.dead, centred, context.n_dead_by_layer))
        found = self.reconstruct(selected, centred, centre)
        x_hat, errors = offset, []
        for _, parts in found[: len(groups)]:
            x_hat = x_hat + self.axis.scatter_sum(parts)
            errors.append(rows.targets - x_hat)
        losses = [e.square().sum() / (len(centred) * context.variance) for e in errors]
        fvu, error = losses[self.main_index], errors[self.main_index].detach()
        auxk = fvu.new_zeros(())
        for _, parts in found[len(groups) :]:
            e_hat = self.axis.scatter_sum(parts)
            auxk = auxk_loss(self.axis, rows.targets, error, e_hat)
        total = config.auxk_coefficient * auxk
        for weight, loss in zip(self.loss_weights, losses, strict=True):
            total = total + weight * loss
        terms = LossTerms(fvu, auxk, fvu.new_zeros(()), total)
        acts = torch.cat([acts for acts, _ in found[: self.main_index + 1]])
        entries = Entries.stacked([entries for _, entries in groups[: self.main_index + 1]])
        fired, active = firings(acts, entries), (acts > 0).sum()
        return Output(
            terms, fired, active, error, prefix_fvu=losses if config.prefix_widths else ()
        )

    def e_hat(
        self, dead: Bool[Tensor, " n_local"], x: Float[Tensor, "batch d_in"]
    ) -> Float[Tensor, "batch d_out"]:
        centred = self.encoder_inputs(x)
        [(_, parts)] = self.reconstruct([self.select_among(dead, centred)], centred, None)
        return self.axis.scatter_sum(parts)
