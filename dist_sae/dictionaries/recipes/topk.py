"""TopK with AuxK (Gao et al. 2024, arXiv:2406.04093).

    z     = W_enc (x - b_dec) + b_enc
    f     = relu(TopK_k(z))
    x_hat = W_dec^T f + b_dec
    L     = E|x - x_hat|^2 / Var(x)  +  alpha L_aux            (auxk.py)

Decoder rows have unit norm; the gradient's part along them is left out.
"""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dist_sae.config.sae import CountsLatentsConfig
from dist_sae.dictionaries.auxk import auxk_loss, retie_
from dist_sae.dictionaries.base import (
    Codes,
    Dictionary,
    LossTerms,
    Output,
    Rows,
    StepContext,
    firings,
)
from dist_sae.dictionaries.constraints import normalise_rows_
from dist_sae.dictionaries.init import initialise_tied
from dist_sae.dictionaries.schedules import annealed
from dist_sae.kernels import Entries, autograd

_SHARE_OF_ONE = 0.98


class TopK(Dictionary):
    """The dictionary and its loss."""

    config: CountsLatentsConfig

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "batch d_in"]) -> Codes:
        centred = self.axis.gather(x) - self.biases()[0]
        pre_acts, entries = self.topk_entries(
            centred, self.config.k, product_dtype=self.W_enc.dtype
        )
        return Codes(pre_acts.relu(), entries.latents, entries.starts)

    def objective(self, rows: Rows, context: StepContext) -> Output:
        config = self.config
        k = annealed(context.progress, config.k, config.k_start, config.k_anneal_share)
        centre, b_dec = self.biases()
        centred = (self.axis.gather(rows.inputs) - centre).detach()
        selected = [self.select(centred, k)]
        if config.auxk and context.n_dead:
            selected.append(self.select_among(context.dead, centred))
        (acts, parts), *aux = self.reconstruct(selected, centred, centre)
        error = rows.targets - (self.axis.scatter_sum(parts) + b_dec)
        fvu = error.square().sum() / (len(centred) * context.variance)
        auxk = fvu.new_zeros(())
        for _, parts in aux:
            auxk = auxk_loss(self.axis, rows.targets, error.detach(), self.axis.scatter_sum(parts))
        terms = LossTerms(fvu, auxk, fvu.new_zeros(()), fvu + config.auxk_coefficient * auxk)
        return Output(terms, firings(acts, selected[0][1]), (acts > 0).sum(), error.detach())

    @property
    def initial_share(self) -> float:
        """A little less for one latent a row.

        At the best length what is left of a row is at right angles to its one latent, so that the
        encoder's gradient would be nothing but rounding, which Adam makes steps of.
        """
        k = annealed(0.0, self.config.k, self.config.k_start, self.config.k_anneal_share)
        return _SHARE_OF_ONE if k == 1 else 1.0

    def select(
        self, centred: Float[Tensor, "rows d_in"], k: int
    ) -> tuple[Float[Tensor, " entries"], Entries]:
        """(Pre-activations, entries) of this shard that training keeps of the replica's rows."""
        return self.topk_entries(centred, k)

    def select_among(
        self, dead: Bool[Tensor, " n_local"], centred: Float[Tensor, "rows d_in"]
    ) -> tuple[Float[Tensor, " entries"], Entries]:
        """(Pre-activations, entries) of this shard's part of AuxK's choice among dead latents."""
        return self.topk_entries(centred, self.config.auxk, among=dead.nonzero()[:, 0])

    def reconstruct(
        self,
        selected: Sequence[tuple[Float[Tensor, " _"], Entries]],
        centred: Float[Tensor, "rows d_in"],
        centre: Float[Tensor, " d_in"],
    ) -> list[tuple[Float[Tensor, " _"], Float[Tensor, "rows d_out"]]]:
        """(Codes, this shard's part of x_hat - b_dec) of each selection of pre-activations.

        All in one, as of that many times the rows: a gradient is as large as the dictionary, and
        autograd would make one of each weight for each selection, and add them up.
        """
        entries = Entries.stacked([entries for _, entries in selected])
        pre_acts = autograd.encode(
            torch.cat([pre_acts for pre_acts, _ in selected]),
            self.kernels,
            entries,
            centred.expand(len(selected), -1, -1).flatten(0, 1),
            self.W_enc,
            self.b_enc,
            centre,
        )
        acts = pre_acts.relu()
        parts = autograd.decode(acts, self.kernels, entries, self.W_dec, unit_rows=True)
        counts = [len(pre_acts) for pre_acts, _ in selected]
        apart = parts.view(len(selected), len(centred), parts.shape[1])
        return list(zip(torch.split(acts, counts), apart, strict=True))

    def e_hat(
        self, dead: Bool[Tensor, " n_local"], x: Float[Tensor, "batch d_in"]
    ) -> Float[Tensor, "batch d_out"]:
        """What dead latents make of the errors of rows, as in `auxk`."""
        centre, _ = self.biases()
        centred = self.axis.gather(x) - centre
        [(_, parts)] = self.reconstruct([self.select_among(dead, centred)], centred, centre)
        return self.axis.scatter_sum(parts)

    def initialise(self, rows: Rows, seed: int) -> None:
        initialise_tied(self, rows, seed)

    def constrain(self) -> None:
        normalise_rows_(self.W_dec)

    @torch.no_grad()
    def retie(
        self,
        stuck: Bool[Tensor, " n_local"],
        x: Float[Tensor, "batch d_in"],
        error: Float[Tensor, "batch d_out"],
    ) -> None:
        if self.config.auxk:
            retie_(self, stuck, error, partial(self.e_hat, stuck, x))
