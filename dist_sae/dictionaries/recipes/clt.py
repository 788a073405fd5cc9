"""Cross-layer transcoder (Ameisen et al., Circuit Tracing, March 2025; Anthropic).

    z^l     = W_enc^l x^l + b_enc^l                                     l = 0 .. L-1
    f       = z among the (rows * k) largest positive ones of the global batch, over all layers;
              or (clt_jumprelu) z H(z - theta)
    y_hat^m = sum_{l <= m} W_dec^{l->m}^T f^l + b_dec^m
    L       = E sum_m |y^m - y_hat^m|^2 / Var(y)  +  alpha L_aux (auxk.py),  or  + lambda E|f|_0

A latent reads one layer, x^l, and writes that layer and all later ones, y^l .. y^{L-1}. Read and
written sites may differ (e.g. x the inputs of MLPs, y their outputs). If they are the same, this is
a weakly causal crosscoder (Lindsey et al., October 2024). Inputs are not centered. Decoder norms
are free and start at 0, with b_dec at the center of the targets. So latents are ranked by z alone,
not by z times the decoder norm.

Latent n reads layer n % L, so every shard of whole groups has the same number of latents per layer.
Weights from a layer to an earlier one are neither stored nor computed. The decoder of a group of L
consecutive latents is L (L + 1) / 2 contiguous vectors, W^{0->0} W^{0->1} .. W^{0->L-1} W^{1->1} ..
W^{L-1->L-1}. They are stored as L rows of W_dec, so dim 0 counts latents, but a row does not belong
to a single latent. For the kernels, a row of the batch becomes L rows, and a selected latent that
reads layer l becomes L - l entries.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_sae.config.clt import CLTConfig
from dist_sae.config.sae import CLTJumpReLUConfig
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.constraints import normalise_rows_
from dist_sae.dictionaries.init import geometric_median, mean_row, random_rows
from dist_sae.dictionaries.interface import Rows, Widths
from dist_sae.dictionaries.penalised import RARE, set_active_share
from dist_sae.dictionaries.recipes.jumprelu import JumpReLU
from dist_sae.dictionaries.recipes.topk import TopK
from dist_sae.errors import ConfigError
from dist_sae.kernels import Entries, autograd, select, starts_of


class CrossLayer(Dictionary):
    """A dictionary whose latents each read one layer, and write that layer and all later ones."""

    config: CLTConfig | CLTJumpReLUConfig
    unit_rows = False

    def __init__(
        self,
        config: CLTConfig | CLTJumpReLUConfig,
        widths: Widths | int,
        *place: Any,
        **precision: Any,
    ) -> None:
        _check_widths(config.layers, Widths.of(widths))
        super().__init__(config, widths, *place, **precision)

    @property
    def layers(self) -> int:
        return self.config.layers

    @property
    def _pairs_of_group(self) -> int:
        """Number of vectors in a group of L latents: one per pair of a read and a written layer."""
        return self.layers * (self.layers + 1) // 2

    def row_widths(self) -> tuple[int, int]:
        return self.widths.reads[0], self._pairs_of_group * self.widths.writes[0] // self.layers

    def decoder_block(
        self, latents: slice | Int[Tensor, " some"], W_dec: Float[Tensor, "n_local written"]
    ) -> tuple[slice, Float[Tensor, "some columns"]]:
        layers, d_write = self.layers, self.widths.writes[0]
        groups: slice | Tensor
        if isinstance(latents, slice):
            layer = latents.start % layers
            groups = slice(latents.start // layers, latents.stop // layers)
        else:
            layer, groups = int(latents[0]) % layers, latents // layers
        first, stop = (d_write * _before(n, layers) for n in (layer, layer + 1))
        by_group = W_dec.view(-1, self._pairs_of_group * d_write)
        return slice(layer * d_write, None), by_group[groups, first:stop]

    def decoder_rows(
        self, latents: slice | Int[Tensor, " some"] = slice(None)
    ) -> Float[Tensor, "some d_out"]:
        """Return decoder rows over all layers, with zeros in layers before the one a latent reads.

        The result is a new tensor.
        """
        chosen = torch.arange(len(self.W_enc), device=self.W_dec.device)[latents]
        rows = self.W_dec.new_zeros(len(chosen), self.widths.d_out)
        for layer in range(self.layers):
            here = (chosen % self.layers == layer).nonzero()[:, 0]
            if len(here):
                columns, decoder = self.decoder_block(chosen[here], self.W_dec)
                rows[here, columns] = decoder
        return rows

    def pre_acts_at(
        self, rows: Float[Tensor, "rows d_in"], entries: Entries
    ) -> Float[Tensor, " entries"]:
        read = self._read_by(entries)
        in_order, order = _sorted(read)
        starts = starts_of(in_order, len(rows) * self.layers)
        of_layers = Entries(entries.latents[order], starts, entries.n_latents)
        found = self.kernels.gather_dot(self._of_layers(rows), of_layers, self.W_enc)
        return torch.empty_like(found).index_copy_(0, order, found) + self.b_enc[entries.latents]

    def encode_at(
        self,
        pre_acts: Float[Tensor, " entries"],
        entries: Entries,
        rows: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "n_local read"],
        centre: Float[Tensor, " d_in"] | None = None,  # noqa: ARG002 - is 0
    ) -> Float[Tensor, " entries"]:
        # rows need not be ascending here: only sums by latent use these entries
        of_layers = Entries(entries.latents, entries.starts, entries.n_latents)
        of_layers.rows, of_layers.by_latent = self._read_by(entries), entries.by_latent
        x = self._of_layers(rows)
        return autograd.encode(pre_acts, self.kernels, of_layers, x, W_enc, self.b_enc)

    def decode_at(
        self,
        acts: Float[Tensor, " entries"],
        entries: Entries,
        W_dec: Float[Tensor, "n_local written"],
    ) -> Float[Tensor, "rows d_out"]:
        layers = self.layers
        rows, read = len(entries.starts), self._read_by(entries)
        # sorted by layer, the latents that write a given layer come first in their row
        in_order, order = _sorted(read)
        counts = starts_of(in_order, rows * layers + 1).diff().view(rows, layers)
        counts = counts.cumsum(1).flatten()
        starts, n_pairs = counts.cumsum(0) - counts, int(counts.sum())
        places = torch.arange(rows * layers, device=read.device)
        places = places.repeat_interleave(counts, output_size=n_pairs)
        within = torch.arange(n_pairs, device=read.device) - starts[places]
        sources = order[entries.starts[places // layers] + within]
        written, latents = places % layers, entries.latents[sources]
        layer, group = latents % layers, latents // layers
        vectors = group * self._pairs_of_group + _before(layer, layers) + written - layer
        pairs = Entries(vectors, starts, entries.n_latents // layers * self._pairs_of_group)
        pairs.rows = places
        spread: Tensor = _Spread.apply(acts, sources, written, layers)  # type: ignore[no-untyped-call]
        vectors_of = W_dec.view(-1, self.widths.writes[0])
        parts = autograd.decode(spread, self.kernels, pairs, vectors_of, unit_rows=self.unit_rows)
        return parts.view(rows, self.widths.d_out)

    @torch.no_grad()
    def initialise(self, rows: Rows, seed: int, *, rescale: bool = True) -> None:  # noqa: ARG002
        """Set random unit encoder rows that see centered inputs, a decoder of 0, and b_dec.

        b_dec is the targets' geometric median. At the mean of the batch the gradient of b_dec would
        be pure rounding error, which Adam would amplify to full steps.
        """
        random_rows(self.W_enc, seed, self.first_latent)
        normalise_rows_(self.W_enc)
        centre = mean_row(rows.inputs, self.axis)
        for latents, read in self.tiles(select.CHUNK_LATENTS):
            self.b_enc[latents] = -(self.W_enc[latents] @ centre[read])
        self.W_dec.zero_()
        self.b_dec.copy_(geometric_median(rows.targets, self.axis))
        self.set_initial_sparsity(rows.inputs)

    def revive(
        self,
        stuck: Bool[Tensor, " n_local"],
        x: Float[Tensor, "batch d_in"],
        error: Float[Tensor, "batch d_out"],  # noqa: ARG002 - of other layers than it reads
    ) -> None:
        """Set the biases of stuck latents so that they are active on a few rows of the batch."""
        thresholds = self.inference_thresholds()
        assert thresholds is not None
        set_active_share(self, stuck, x, thresholds, RARE)

    def _of_layers(self, rows: Float[Tensor, "rows d_in"]) -> Float[Tensor, "_ d_read"]:
        """Reshape rows so that each layer of a row becomes a row itself."""
        return rows.reshape(len(rows) * self.layers, self.widths.reads[0])

    def _read_by(self, entries: Entries) -> Int[Tensor, " entries"]:
        """Return the row of `_of_layers` that each entry's latent reads, numbered by row, layer."""
        return entries.rows * self.layers + entries.latents % self.layers


class CLT(CrossLayer, TopK):
    """CLT with k active latents per row, on average over the whole batch and all layers."""

    config: CLTConfig

    def biases(self, x: Float[Tensor, "batch d_in"]) -> tuple[None, Float[Tensor, "*rows d_out"]]:
        """Return no input bias, since inputs are not centered, and the output bias."""
        return None, self.offset(x)


class CLTJumpReLU(CrossLayer, JumpReLU):
    """CLT with a learned threshold per latent and a penalty on the number of active latents."""

    config: CLTJumpReLUConfig


class _Spread(torch.autograd.Function):
    """The code of each pair's latent. Gradients are summed in the same order on every device."""

    @staticmethod
    def forward(ctx: Any, acts: Tensor, sources: Tensor, written: Tensor, layers: int) -> Tensor:
        ctx.save_for_backward(sources, written)
        ctx.shape = len(acts), layers
        return acts.index_select(0, sources)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        sources, written = ctx.saved_tensors
        by_layer = gradient.new_zeros(ctx.shape)
        by_layer[sources, written] = gradient
        return by_layer.sum(1), None, None, None


def _sorted(numbers: Int[Tensor, " _"]) -> tuple[Int[Tensor, " _"], Int[Tensor, " _"]]:
    """Sort stably and return the indices too. An int32 sort is far faster than an int64 sort."""
    in_order, order = numbers.int().sort(stable=True)
    return in_order, order


def _before(layer: Any, layers: int) -> Any:
    """Return the offset, in a group's vectors, of the latent that reads `layer`."""
    return layer * layers - layer * (layer - 1) // 2


def _check_widths(layers: int, widths: Widths) -> None:
    for key, of_sites in (("reads", widths.reads), ("writes", widths.writes)):
        if len(of_sites) != layers or len(set(of_sites)) > 1:
            there = ", ".join(map(str, of_sites))
            raise ConfigError(
                f"sae.{key}: a cross-layer transcoder of {layers} layers needs {layers} sites "
                f"of equal width; got widths {there}"
            )
    if (layers + 1) * widths.writes[0] % 2:
        raise ConfigError(
            f"sae.writes: the sites have width {widths.writes[0]}; with an even number of layers, "
            f"the width must be even"
        )
