"""TopK (Gao et al. 2024, arXiv:2406.04093) and BatchTopK (Bussmann et al. 2024, arXiv:2412.06410).

    z     = W_enc (x - b_dec) + b_enc
    f     = relu(TopK_k(z)),  or (BatchTopK) relu(z) where it is among the (rows * k) largest of the
            global batch, else 0
    x_hat = W_dec^T f + b_dec
    L     = E|x - x_hat|^2 / Var(x)  +  alpha L_aux            (auxk.py)

With BatchTopK a row has k active latents on average, and its codes depend on the rows beside it. At
inference they do not: f = z where z > theta, with theta the running mean of the smallest f kept in
a batch. Decoder rows have unit norm, so that z alone says how much a latent matters; the gradient's
part along them is left out.
"""

from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from dist_sae.config.sae import BatchTopKConfig, TopKConfig
from dist_sae.dictionaries.auxk import WithAuxK, auxk_loss
from dist_sae.dictionaries.base import firings
from dist_sae.dictionaries.interface import LossTerms, Output, Rows, StepContext, Widths
from dist_sae.dictionaries.schedules import annealed
from dist_sae.dictionaries.selection import BatchTopK, RowTopK


class TopK(WithAuxK):
    """Keeps the k largest pre-activations of each row, or k per row of the whole batch."""

    selection: RowTopK | BatchTopK

    def __init__(
        self,
        config: TopKConfig | BatchTopKConfig,
        widths: Widths | int,
        *place: Any,
        **precision: Any,
    ) -> None:
        super().__init__(config, widths, *place, **precision)
        self.selection = self.by_row = RowTopK(self, config.k, self.axis)
        if isinstance(config, BatchTopKConfig):
            self.selection = BatchTopK(self, config.threshold_decay)

    def objective(self, rows: Rows, context: StepContext) -> Output:
        config = self.config
        k = annealed(context.progress, config.k, config.k_start, config.k_anneal_share)
        centre, b_dec = self.biases()
        centred = (self.axis.gather(rows.inputs) - centre).detach()
        selected = [self.selection.select(self.products(centred, self.product_dtype), k)]
        if config.auxk and context.n_dead:
            selected.append(self.select_among(context.dead, centred))
        (acts, parts), *aux = self.reconstruct(selected, centred, centre)
        error = rows.targets - (self.axis.scatter_sum(parts) + b_dec)
        fvu = error.square().sum() / (len(centred) * context.variance)
        auxk = fvu.new_zeros(())
        for _, parts in aux:
            e_hat = self.axis.scatter_sum(parts)
            auxk = auxk_loss(self.axis, rows.targets, error.detach(), e_hat)
        terms = LossTerms(fvu, auxk, fvu.new_zeros(()), fvu + config.auxk_coefficient * auxk)
        return Output(terms, firings(acts, selected[0][1]), (acts > 0).sum(), error.detach())

    def e_hat(
        self, dead: Bool[Tensor, " n_local"], x: Float[Tensor, "batch d_in"]
    ) -> Float[Tensor, "batch d_out"]:
        centre, _ = self.biases()
        centred = self.encoder_inputs(x)
        [(_, parts)] = self.reconstruct([self.select_among(dead, centred)], centred, centre)
        return self.axis.scatter_sum(parts)
