"""AuxK: dead latents learn to predict the live latents' error (Gao et al. 2024, A.2).

    e     = target - x_hat, held fixed
    e_hat = W_dec^T relu(TopK_auxk(z of dead latents))      (no bias)
    L_aux = sum |e - e_hat|^2 / sum |e - mean e|^2          (sums over the global batch)

The loss is 0 if the errors do not differ from row to row. There is nothing to learn then, and the
denominator would consist of rounding errors.

A latent whose z is negative on every row gets no gradient from this loss and would stay dead. After
another `dead_after_rows` rows it is *stuck* and is re-tied: its encoder row is set to its decoder
row, and its bias to 0. Stuck latents are often similar, for example along one large direction of
the rows, so at the length of other encoder rows they would overshoot together. Instead they all
start at the same length: the one that brings e_hat closest to e, but at most 1. Without the limit,
latents that few rows activate, and only weakly, would start at lengths in the hundreds.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dist_sae.config.dictionary import KSelectionConfig
from dist_sae.dictionaries.axis import LatentAxis
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.init import initialise_tied, least_squares_scale
from dist_sae.dictionaries.interface import Rows, Selected
from dist_sae.dictionaries.schedules import annealed
from dist_sae.dictionaries.selection import RowTopK
from dist_sae.kernels import Entries, select

_LEAST_LENGTH = 0.01  # a latent with an encoder row of length 0 would never be active
_MOST_LENGTH = 1.0  # an error is a part of its row, so it is not longer than the row
_LEAST_SPREAD = 1e-4  # share of the squared errors; bf16 products of equal rows may differ by this
_RATIO_IF_K_IS_1 = 0.98  # see `initial_length_ratio`
_ROUNDINGS = 16  # errors up to this many machine epsilons of their row count as 0


def auxk_loss(
    axis: LatentAxis,
    targets: Float[Tensor, "batch d_out"],
    error: Float[Tensor, "batch d_out"],
    e_hat: Float[Tensor, "batch d_out"],
) -> Float[Tensor, ""]:
    """Compute L_aux for this rank's rows.

    Args:
        axis: This rank's place.
        targets: This rank's targets.
        error: e for the same rows.
        e_hat: e_hat for the same rows.
    """
    spread, is_there = _spread(axis, targets, error)  # stays on the device: no host sync
    loss = (error - e_hat).square().sum() / spread * axis.replicas
    return torch.where(is_there, loss, 0.0)


class WithAuxK(Dictionary):
    """Base of dictionaries with k active latents per row whose dead latents learn by AuxK.

    By default, b_dec is subtracted from the inputs, and decoder rows have unit norm.
    """

    config: KSelectionConfig
    by_row: RowTopK
    """Selection of each row's dead latents for AuxK."""

    @property
    def decoder_weight(self) -> Float[Tensor, "n_local d_out"]:
        """W_dec, with a gradient that is projected for the constraints other than `unit_rows`."""
        return self.W_dec

    def biases(
        self, x: Float[Tensor, "batch d_in"]
    ) -> tuple[Float[Tensor, " d_in"] | None, Float[Tensor, "*rows d_out"]]:
        """Return the bias subtracted from the inputs, if any, and the one added to the outputs.

        Both are b_dec by default. One method returns both, so that the gradient of a shared bias is
        summed over the replica only once.
        """
        b_dec = self.offset(x)
        return b_dec, b_dec

    @torch.no_grad()
    def centred(
        self, inputs: Float[Tensor, "rows d_in"], centre: Float[Tensor, " d_in"] | None
    ) -> Float[Tensor, "rows d_in"]:
        """Subtract the center from the inputs, if there is one, as the encoder expects."""
        return inputs if centre is None else inputs - centre

    @torch.no_grad()
    def encoder_inputs(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "rows d_in"]:
        return self.centred(self.axis.gather(x), self.biases(x)[0])

    def select_among(
        self,
        dead: Bool[Tensor, " n_local"],
        centred: Float[Tensor, "rows d_in"],
        counts: Sequence[int] | None = None,
    ) -> Selected:
        """Select the `auxk` largest dead latents per row; return this shard's values and entries.

        Args:
            dead: Mask of this shard's dead latents.
            centred: Inputs as the encoder reads them.
            counts: Numbers of dead latents, one per input layer. Without them the host waits for
                the device.
        """
        among = select.true_indices(dead, None if counts is None else sum(counts))
        products = self.products(centred, self.product_dtype, among, counts)
        return self.by_row.select(products, self.config.auxk)

    def e_hat(
        self, dead: Bool[Tensor, " n_local"], x: Float[Tensor, "batch d_in"]
    ) -> Float[Tensor, "batch d_out"]:
        """Compute e_hat, the dead latents' reconstruction, for this rank's inputs."""
        raise NotImplementedError

    def reconstruct(
        self,
        selected: Sequence[Selected],
        centred: Float[Tensor, "rows d_in"],
        centre: Float[Tensor, " d_in"] | None,
    ) -> list[tuple[Float[Tensor, " _"], Float[Tensor, "rows d_out"]]]:
        """Return codes and this shard's part of x_hat - offset for each selection.

        All selections share one product. With a product each, autograd would allocate a gradient
        per selection and weight, and a gradient is as large as its weight.
        """
        entries = Entries.stacked([entries for _, entries in selected])
        pre_acts = self.encode_at(
            torch.cat([pre_acts for pre_acts, _ in selected]),
            entries.folded(len(centred)),
            centred,
            self.W_enc,
            centre,
        )
        acts = pre_acts.relu()
        parts = self.decode_at(acts, entries, self.decoder_weight)
        counts = [len(pre_acts) for pre_acts, _ in selected]
        apart = parts.view(len(selected), len(centred), parts.shape[1])
        return list(zip(torch.split(acts, counts), apart, strict=True))

    @property
    def initial_length_ratio(self) -> float:
        """Initial encoder length over the optimal one: 1, or a little less if k is 1.

        With k = 1 and the optimal length, a row's error is orthogonal to its only latent. The
        encoder's gradient would be pure rounding error, which Adam would amplify to full steps.
        """
        k = annealed(0.0, self.config.k, self.config.k_start, self.config.k_anneal_share)
        return _RATIO_IF_K_IS_1 if k == 1 else 1.0

    def initialise(self, rows: Rows, seed: int, *, rescale: bool = True) -> None:
        initialise_tied(self, rows, seed, rescale=rescale)

    @torch.no_grad()
    def revive(
        self,
        stuck: Bool[Tensor, " n_local"],
        x: Float[Tensor, "batch d_in"],
        error: Float[Tensor, "batch d_out"],
    ) -> None:
        """Re-tie stuck latents: encoder rows become scaled decoder rows (see above), biases 0."""
        if not self.config.auxk:
            return
        self.W_enc[stuck] = self.W_dec[stuck]
        self.b_enc[stuck] = 0
        scale = least_squares_scale(self.axis, error, self.e_hat(stuck, x))
        self.W_enc[stuck] *= scale.clamp(_LEAST_LENGTH, _MOST_LENGTH)


def _spread(axis: LatentAxis, targets: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum |e - mean e|^2 over all ranks, and whether it is more than rounding error.

    The sum is replaced by 1 if it is only rounding error.
    """
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in (error, targets)]
    total = axis.total(torch.cat([error.sum(0, dtype=torch.float64), torch.stack(norms).square()]))
    sums, (squares, of_rows) = total[:-2], total[-2:]
    spread = squares - sums.square().sum() / (len(error) * axis.replicas * axis.shards)
    rounding = (_ROUNDINGS * torch.finfo(error.dtype).eps) ** 2 * of_rows
    is_there = spread > torch.maximum(rounding, _LEAST_SPREAD * squares)
    return torch.where(is_there, spread, 1.0).to(error.dtype), is_there
