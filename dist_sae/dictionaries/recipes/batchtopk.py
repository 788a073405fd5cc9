"""BatchTopK (Bussmann et al. 2024, arXiv:2412.06410), with AuxK.

    z     = W_enc (x - b_dec) + b_enc
    f     = relu(z) where it is among the (rows * k) largest of the global batch, else 0
    x_hat = W_dec^T f + b_dec
    L     = E|x - x_hat|^2 / Var(x)  +  alpha L_aux            (auxk.py)

A row has k active latents on average, and its codes depend on the rows beside it. At inference they
do not: f = z where z > theta, with theta the running mean of the smallest f kept in a batch.
Decoder rows have unit norm, so that z alone says how much a latent matters.
"""

from typing import Any

from dist_sae.config.sae import BatchTopKConfig
from dist_sae.dictionaries import selection
from dist_sae.dictionaries.recipes.topk import TopK


class BatchTopK(TopK):
    """The loss of `TopK` with codes selected over the batch."""

    def __init__(self, config: BatchTopKConfig, d_in: int, *place: Any, **precision: Any) -> None:
        super().__init__(config, d_in, *place, **precision)
        self.selection = selection.BatchTopK(self, config.threshold_decay)
