"""TopK with AuxK (Gao et al. 2024, arXiv:2406.04093).

    z     = W_enc (x - b_dec) + b_enc
    f     = relu(TopK_k(z))
    x_hat = W_dec^T f + b_dec
    L     = E|x - x_hat|^2 / Var(x)  +  alpha L_aux            (auxk.py)

Decoder rows have unit norm; the gradient's part along them is left out.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dist_sae.config.sae import CountsLatentsConfig
from dist_sae.sae.auxk import auxk_loss, retie_
from dist_sae.sae.base import Codes, Dictionary, LossTerms, Output, Step, fired
from dist_sae.sae.constraints import normalise_rows_
from dist_sae.sae.init import initialise_tied
from dist_sae.sae.kernels import Entries, autograd
from dist_sae.sae.schedules import annealed


class TopK(Dictionary):
    """The dictionary and its loss."""

    config: CountsLatentsConfig

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "batch d_in"]) -> Codes:
        centred = self.axis.gather(x) - self.b_dec
        pre_acts, entries = self.topk_entries(
            centred, self.config.k, product_dtype=self.W_enc.dtype
        )
        return Codes(pre_acts.relu(), entries.latents, entries.starts)

    def objective(self, x: Float[Tensor, "batch d_in"], step: Step) -> Output:
        config = self.config
        k = annealed(step.progress, config.k, config.k_start, config.k_anneal_share)
        b_dec = self.axis.replicated(self.b_dec)
        centred = (self.axis.gather(x) - b_dec).detach()
        pre_acts, entries = self.select(centred, k)
        pre_acts = autograd.encode(
            pre_acts, self.kernels, entries, centred, self.W_enc, self.b_enc, b_dec
        )
        acts = pre_acts.relu()
        parts = autograd.decode(acts, self.kernels, entries, self.W_dec, unit_rows=True)
        error = x - (self.axis.scatter_sum(parts) + b_dec)
        fvu = error.square().sum() / (len(centred) * step.variance)

        def error_of(dead: Tensor) -> Tensor:
            pre_acts, entries = self.topk_entries(centred, config.auxk, among=dead.nonzero()[:, 0])
            pre_acts = autograd.encode(
                pre_acts, self.kernels, entries, centred, self.W_enc, self.b_enc, b_dec
            )
            parts = autograd.decode(
                pre_acts.relu(), self.kernels, entries, self.W_dec, unit_rows=True
            )
            return self.axis.scatter_sum(parts)

        auxk = fvu.new_zeros(())
        if config.auxk:
            auxk = auxk_loss(self.axis, error.detach(), step, error_of)
        terms = LossTerms(fvu, auxk, fvu.new_zeros(()), fvu + config.auxk_coefficient * auxk)
        return Output(terms, fired(acts, entries), (acts > 0).sum(), error.detach())

    def select(
        self, centred: Float[Tensor, "rows d_in"], k: int
    ) -> tuple[Float[Tensor, " entries"], Entries]:
        """(Pre-activations, entries) of this shard that training keeps of the replica's rows."""
        return self.topk_entries(centred, k)

    def initialise(self, x: Float[Tensor, "batch d_in"], seed: int) -> None:
        initialise_tied(self, x, seed)

    def constrain(self) -> None:
        normalise_rows_(self.W_dec)

    @torch.no_grad()
    def retie(
        self,
        stuck: Bool[Tensor, " n_local"],
        x: Float[Tensor, "batch d_in"],
        error: Float[Tensor, "batch d_in"],
    ) -> None:
        if not self.config.auxk:
            return
        centred = self.axis.gather(x) - self.b_dec

        def error_of(stuck: Tensor) -> Tensor:
            pre_acts, entries = self.topk_entries(
                centred, self.config.auxk, among=stuck.nonzero()[:, 0]
            )
            return self.axis.scatter_sum(self.kernels.combine(pre_acts.relu(), entries, self.W_dec))

        retie_(self, stuck, error, error_of)
