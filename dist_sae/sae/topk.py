"""TopK with AuxK (Gao et al. 2024, arXiv:2406.04093).

    z     = W_enc (x - b_dec) + b_enc
    f     = relu(TopK_k(z))
    x_hat = W_dec^T f + b_dec
    L     = E|x - x_hat|^2 / Var(x)  +  alpha E|e - e_hat|^2 / Var(e)

with e = x - x_hat, held fixed, and e_hat = W_dec^T relu(TopK_auxk(z of dead latents)), without a
bias. Decoder rows have unit norm; the gradient's part along them is taken out before Adam sees it.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dist_sae.config.sae import TopKConfig
from dist_sae.sae.base import Codes, GlobalSum, LossTerms, Output
from dist_sae.sae.constraints import normalise_rows_, remove_parallel_
from dist_sae.sae.kernels import torch as kernels


class TopK(nn.Module):
    """The dictionary and its loss.

    Args:
        config: The recipe.
        d_in: Width of the activations.
        product_dtype: Precision of the encoder product in training.
        dtype: Precision of the parameters.
    """

    def __init__(
        self,
        config: TopKConfig,
        d_in: int,
        product_dtype: torch.dtype = torch.float32,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = config
        self.product_dtype = product_dtype
        self.W_enc = nn.Parameter(torch.zeros(config.n_latents, d_in, dtype=dtype))
        self.W_dec = nn.Parameter(torch.zeros(config.n_latents, d_in, dtype=dtype))
        self.b_enc = nn.Parameter(torch.zeros(config.n_latents, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(d_in, dtype=dtype))

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "batch d_in"]) -> Codes:
        pre_acts, latents = kernels.select_topk(
            x - self.b_dec, self.W_enc, self.b_enc, self.config.k, self.W_enc.dtype
        )
        return Codes(pre_acts.relu(), latents)

    @torch.no_grad()
    def decode(self, codes: Codes) -> Float[Tensor, "batch d_in"]:
        return kernels.sparse_matmul(codes.acts, codes.latents, self.W_dec) + self.b_dec

    def forward(
        self,
        x: Float[Tensor, "batch d_in"],
        variance: float,
        dead: Bool[Tensor, " n_latents"],
        global_sum: GlobalSum,
    ) -> Output:
        """`objective`, under the name that wrappers of modules call."""
        return self.objective(x, variance, dead, global_sum)

    def objective(
        self,
        x: Float[Tensor, "batch d_in"],
        variance: float,
        dead: Bool[Tensor, " n_latents"],
        global_sum: GlobalSum,
    ) -> Output:
        centred = (x - self.b_dec).detach()
        pre_acts, latents = self._select(centred, self.W_enc, self.b_enc, self.config.k)
        selection = kernels.Selection(latents, self.config.n_latents)
        acts = kernels.encode(pre_acts, selection, centred, self.W_enc, self.b_enc, self.b_dec)
        x_hat = kernels.decode(acts, selection, self.W_dec) + self.b_dec
        fvu = (x - x_hat).square().sum() / (len(x) * variance)
        auxk = self._auxk_loss((x - x_hat).detach(), centred, dead, global_sum)
        terms = LossTerms(fvu, auxk, fvu + self.config.auxk_coefficient * auxk)
        return Output(terms, Codes(acts.detach(), latents))

    def constrain_gradients(self) -> None:
        if self.W_dec.grad is not None:
            remove_parallel_(self.W_dec.grad, self.W_dec)

    def constrain_parameters(self) -> None:
        normalise_rows_(self.W_dec)

    def _auxk_loss(
        self,
        error: Float[Tensor, "batch d_in"],
        centred: Float[Tensor, "batch d_in"],
        dead: Bool[Tensor, " n_latents"],
        global_sum: GlobalSum,
    ) -> Float[Tensor, ""]:
        """E|e - e_hat|^2 / Var(e) over the global batch; 0 without dead latents or variance."""
        candidates = dead.nonzero()[:, 0]
        if not self.config.auxk or not len(candidates):
            return error.new_zeros(())
        spread, rows = _sum_of_squares_about_mean(error, global_sum)
        if not spread > 0:
            return error.new_zeros(())
        pre_acts, within = self._select(
            centred, self.W_enc[candidates], self.b_enc[candidates], self.config.auxk
        )
        selection = kernels.Selection(candidates[within], self.config.n_latents)
        acts = kernels.encode(pre_acts, selection, centred, self.W_enc, self.b_enc, self.b_dec)
        e_hat = kernels.decode(acts, selection, self.W_dec)
        # the mean over ranks of this is the global sum over the global spread
        return (error - e_hat).square().sum() / spread * (rows / len(error))

    @torch.no_grad()
    def _select(
        self, centred: Tensor, W_enc: Tensor, b_enc: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        return kernels.select_topk(centred, W_enc, b_enc, k, self.product_dtype)


def _sum_of_squares_about_mean(error: Tensor, global_sum: GlobalSum) -> tuple[Tensor, int]:
    """(sum |e - mean e|^2, rows), both over the global batch."""
    local = torch.cat([error.sum(0), error.square().sum()[None], error.new_tensor([len(error)])])
    total = global_sum(local)
    sums, squares, rows = total[:-2], total[-2], total[-1]
    return squares - sums.square().sum() / rows, int(rows)
