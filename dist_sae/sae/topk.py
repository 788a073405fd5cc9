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
from dist_sae.sae.auxk import EHat, auxk_loss, retie_
from dist_sae.sae.base import Codes, Dictionary, LossTerms, Output, Step, firings
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
        acts, parts = self.reconstruct(pre_acts, entries, centred, b_dec)
        error = x - (self.axis.scatter_sum(parts) + b_dec)
        fvu = error.square().sum() / (len(centred) * step.variance)
        auxk = fvu.new_zeros(())
        if config.auxk:
            auxk = auxk_loss(self.axis, error.detach(), step, self._error_from(centred, b_dec))
        terms = LossTerms(fvu, auxk, fvu.new_zeros(()), fvu + config.auxk_coefficient * auxk)
        return Output(terms, firings(acts, entries), (acts > 0).sum(), error.detach())

    def select(
        self, centred: Float[Tensor, "rows d_in"], k: int
    ) -> tuple[Float[Tensor, " entries"], Entries]:
        """(Pre-activations, entries) of this shard that training keeps of the replica's rows."""
        return self.topk_entries(centred, k)

    def reconstruct(
        self,
        pre_acts: Float[Tensor, " entries"],
        entries: Entries,
        centred: Float[Tensor, "rows d_in"],
        b_dec: Float[Tensor, " d_in"],
    ) -> tuple[Float[Tensor, " entries"], Float[Tensor, "rows d_in"]]:
        """(Codes, this shard's part of x_hat - b_dec) of selected pre-activations."""
        pre_acts = autograd.encode(
            pre_acts, self.kernels, entries, centred, self.W_enc, self.b_enc, b_dec
        )
        acts = pre_acts.relu()
        return acts, autograd.decode(acts, self.kernels, entries, self.W_dec, unit_rows=True)

    def error_from(self, x: Float[Tensor, "batch d_in"]) -> EHat:
        """What latents that a mask names make of the errors of rows, AuxK's e_hat."""
        return self._error_from(self.axis.gather(x) - self.b_dec, self.b_dec)

    def _error_from(self, centred: Tensor, b_dec: Tensor) -> EHat:
        def e_hat(dead: Tensor) -> Tensor:
            among = dead.nonzero()[:, 0]
            pre_acts, entries = self.topk_entries(centred, self.config.auxk, among=among)
            _, parts = self.reconstruct(pre_acts, entries, centred, b_dec)
            return self.axis.scatter_sum(parts)

        return e_hat

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
        if self.config.auxk:
            retie_(self, stuck, error, self.error_from(x))
