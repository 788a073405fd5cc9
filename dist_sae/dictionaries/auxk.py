"""AuxK: dead latents learn from the error that the live ones leave (Gao et al. 2024, A.2).

    e     = target - x_hat, held fixed
    e_hat = W_dec^T relu(TopK_auxk(z of dead latents))      (no bias)
    L_aux = sum |e - e_hat|^2 / sum |e - mean e|^2          (sums over the global batch)

If errors do not differ from row to row, the loss is 0: there is nothing to learn, and the
denominator would be rounding errors.

A latent whose z is negative on every row gets no gradient from this loss and would stay dead. After
another `dead_after_rows` rows it is *stuck*, and re-tied: its encoder row becomes its decoder row,
and its bias 0. Stuck latents are often alike, for example along one large direction of the rows. At
the length of other rows they would overshoot together. So they all start at one length: the one
that brings e_hat nearest to e, but at most 1. Without this limit, latents that few rows meet, and
hardly along their direction, would start at lengths in the hundreds.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dist_sae.config.dictionary import CountsLatentsConfig
from dist_sae.dictionaries.axis import LatentAxis
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.init import initialise_tied, least_squares_scale
from dist_sae.dictionaries.interface import Rows, Selected
from dist_sae.dictionaries.schedules import annealed
from dist_sae.dictionaries.selection import RowTopK
from dist_sae.kernels import Entries, select

_LEAST_LENGTH = 0.01  # an encoder row of length 0 would never be active
_MOST_LENGTH = 1.0  # an error is a part of its row, so it is not longer than the row
_LEAST_SPREAD = 1e-4  # of the squared errors; bf16 products of equal rows may differ by this
_SHARE_OF_ONE = 0.98  # see `initial_share`
_ROUNDINGS = 16  # an error of so many roundings of a row's elements counts as none


def auxk_loss(
    axis: LatentAxis,
    targets: Float[Tensor, "batch d_out"],
    error: Float[Tensor, "batch d_out"],
    e_hat: Float[Tensor, "batch d_out"],
) -> Float[Tensor, ""]:
    """L_aux of this rank's rows.

    Args:
        axis: This rank's place.
        targets: This rank's targets.
        error: e of the same rows.
        e_hat: e_hat of the same rows.
    """
    spread, is_there = _spread(axis, targets, error)  # stays on the device, so no rank waits
    loss = (error - e_hat).square().sum() / spread * axis.replicas
    return torch.where(is_there, loss, 0.0)


class WithAuxK(Dictionary):
    """A dictionary that keeps k latents per row, and whose dead latents learn by AuxK.

    Here inputs are centred with b_dec, and decoder rows have unit norm.
    """

    config: CountsLatentsConfig
    by_row: RowTopK
    """Selects the dead latents of each row."""

    @property
    def decoder_weight(self) -> Float[Tensor, "n_local d_out"]:
        """W_dec, with its gradient projected onto the constraints other than `unit_rows`."""
        return self.W_dec

    def biases(
        self, x: Float[Tensor, "batch d_in"]
    ) -> tuple[Float[Tensor, " d_in"] | None, Float[Tensor, "*rows d_out"]]:
        """The bias subtracted from inputs, if any, and that added to outputs; here both b_dec.

        In one method, so that the gradient of a shared bias is summed over the replica once.
        """
        b_dec = self.offset(x)
        return b_dec, b_dec

    @torch.no_grad()
    def centred(
        self, inputs: Float[Tensor, "rows d_in"], centre: Float[Tensor, " d_in"] | None
    ) -> Float[Tensor, "rows d_in"]:
        """Inputs as the encoder reads them."""
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
        """Select AuxK's latents among the dead: this shard's pre-activations and entries.

        Args:
            dead: Mask of these latents.
            centred: Inputs as the encoder reads them.
            counts: Their numbers, of each layer that is read; the host waits for the device where
                they are not given.
        """
        among = select.places_of(dead, None if counts is None else sum(counts))
        products = self.products(centred, self.product_dtype, among, counts)
        return self.by_row.select(products, self.config.auxk)

    def e_hat(
        self, dead: Bool[Tensor, " n_local"], x: Float[Tensor, "batch d_in"]
    ) -> Float[Tensor, "batch d_out"]:
        """Reconstruction by dead latents, as above, from this rank's inputs."""
        raise NotImplementedError

    def reconstruct(
        self,
        selected: Sequence[Selected],
        centred: Float[Tensor, "rows d_in"],
        centre: Float[Tensor, " d_in"] | None,
    ) -> list[tuple[Float[Tensor, " _"], Float[Tensor, "rows d_out"]]]:
        """Return codes and this shard's part of x_hat - offset for each selection.

        One product serves all of them. With one each, autograd would make a gradient of each
        weight per selection, and a gradient is as large as its weight.
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
    def initial_share(self) -> float:
        """1, but a little less if each row has one latent.

        At the best length a row's error is at right angles to its only latent. The encoder's
        gradient would then be nothing but rounding, which Adam makes steps of.
        """
        k = annealed(0.0, self.config.k, self.config.k_start, self.config.k_anneal_share)
        return _SHARE_OF_ONE if k == 1 else 1.0

    def initialise(self, rows: Rows, seed: int, *, rescale: bool = True) -> None:
        initialise_tied(self, rows, seed, rescale=rescale)

    @torch.no_grad()
    def revive(
        self,
        stuck: Bool[Tensor, " n_local"],
        x: Float[Tensor, "batch d_in"],
        error: Float[Tensor, "batch d_out"],
    ) -> None:
        """Re-tie stuck latents: their decoder row as encoder, at the length above, and no bias."""
        if not self.config.auxk:
            return
        self.W_enc[stuck] = self.W_dec[stuck]
        self.b_enc[stuck] = 0
        scale = least_squares_scale(self.axis, error, self.e_hat(stuck, x))
        self.W_enc[stuck] *= scale.clamp(_LEAST_LENGTH, _MOST_LENGTH)


def _spread(axis: LatentAxis, targets: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum |e - mean e|^2 over all ranks (1 if that is rounding errors), and if it is not."""
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in (error, targets)]
    total = axis.total(torch.cat([error.sum(0, dtype=torch.float64), torch.stack(norms).square()]))
    sums, (squares, of_rows) = total[:-2], total[-2:]
    spread = squares - sums.square().sum() / (len(error) * axis.replicas * axis.shards)
    rounding = (_ROUNDINGS * torch.finfo(error.dtype).eps) ** 2 * of_rows
    is_there = spread > torch.maximum(rounding, _LEAST_SPREAD * squares)
    return torch.where(is_there, spread, 1.0).to(error.dtype), is_there
