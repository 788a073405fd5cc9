"""The weights of a dictionary and their layout.

W_enc is `[n_latents, d_in]` and W_dec is `[n_latents, d_out]`. Dim 0 is sharded, and decoder rows
are contiguous. In some recipes a latent reads and writes only some of the columns. `tiles`,
`decoder_block` and `decoder_rows` hide that.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dist_sae.config.dictionary import DictionaryConfig
from dist_sae.dictionaries.axis import LatentAxis
from dist_sae.dictionaries.interface import Widths
from dist_sae.kernels import autograd, select


class Weights(nn.Module):
    """Encoder, decoder and biases: this rank's shard of them.

    Every parameter and buffer must be added with `add_tensor`, which declares how it is sharded.

    Args:
        config: The recipe.
        widths: Widths of the sites that are read and written. A number means an autoencoder of a
            single site of that width.
        axis: This rank's place. Only its shard of the dictionary is allocated.
        dtype: Precision of the parameters.
    """

    config: DictionaryConfig
    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_enc: nn.Parameter
    b_dec: nn.Parameter

    def __init__(
        self,
        config: DictionaryConfig,
        widths: Widths | int,
        axis: LatentAxis,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self._per_latent: dict[str, bool] = {}
        n_local = len(axis.latents(config.n_latents))
        self.config = config
        self.widths = Widths.of(widths)
        self.axis = axis
        read, written = self.row_widths()
        for name, shape in {
            "W_enc": (n_local, read),
            "W_dec": (n_local, written),
            "b_enc": (n_local,),
        }.items():
            self.add_tensor(name, nn.Parameter(torch.zeros(shape, dtype=dtype)), per_latent=True)
        b_dec = nn.Parameter(torch.zeros(self.widths.d_out, dtype=dtype))
        self.add_tensor("b_dec", b_dec, per_latent=False)

    def add_tensor(self, name: str, tensor: Tensor, *, per_latent: bool) -> None:
        """Add a parameter, or a buffer if it is not an nn.Parameter, and declare its sharding.

        Args:
            name: Name of the attribute, also in checkpoints.
            tensor: This shard's part.
            per_latent: Whether dim 0 is this shard's latents. If not, all ranks hold equal values.

        Raises:
            ValueError: `per_latent` is true, but the size of dim 0 is not the number of latents.
        """
        n_local = len(self.axis.latents(self.config.n_latents))
        if per_latent and tensor.shape[:1] != (n_local,):
            raise ValueError(
                f"{name}: {tuple(tensor.shape)} does not have {n_local} latents in dim 0"
            )
        self._per_latent[name] = per_latent
        if isinstance(tensor, nn.Parameter):
            self.register_parameter(name, tensor)
        else:
            self.register_buffer(name, tensor)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        self.is_per_latent(name)
        super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:  # noqa: FBT001, FBT002 - torch's signature
        self.is_per_latent(name)
        super().register_buffer(name, tensor, persistent)

    def is_per_latent(self, name: str) -> bool:
        """Return whether dim 0 of a tensor is this shard's latents.

        If it is not, all ranks hold the same tensor.

        Raises:
            ValueError: The tensor was not declared.
        """
        if name not in self._per_latent:
            raise ValueError(
                f"{type(self).__name__}.{name} is declared neither per latent nor replicated; "
                f"add it with add_tensor"
            )
        return self._per_latent[name]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the names and tensors of the parameters, then of the buffers."""
        yield from self.named_parameters()
        yield from self.named_buffers()

    @property
    def replicated(self) -> list[Tensor]:
        """Parameters and buffers whose values are the same on all ranks."""
        return [tensor for name, tensor in self.tensors() if not self.is_per_latent(name)]

    @torch.no_grad()
    def decoder_norms(self) -> Float[Tensor, "n_local sites"]:
        """Compute the norms of this shard's decoder rows at each written site, in site order."""
        some, n = select.CHUNK_LATENTS, len(self.W_enc)
        rows = (self.decoder_rows(slice(first, first + some)) for first in range(0, n, some))
        return torch.cat([autograd.site_norms(part, self.widths.writes) for part in rows])

    @property
    def n_latents(self) -> int:
        """Width of the whole dictionary."""
        return self.config.n_latents

    @property
    def first_latent(self) -> int:
        """Number of this shard's first latent in the whole dictionary."""
        return self.axis.latents(self.n_latents).start

    @property
    def layers(self) -> int:
        """Number of equal parts of the inputs (layers). Latent n reads part n % layers."""
        return 1

    def row_widths(self) -> tuple[int, int]:
        """Return the row widths of W_enc and W_dec."""
        return self.widths.d_in, self.widths.d_out

    def tiles(self, width: int) -> Iterator[tuple[slice, slice]]:
        """Yield slices of at most `width` of this shard's latents, with the columns they read.

        All latents of a slice read the same input columns and write the same target columns.
        """
        step, read = width * self.layers, self.widths.d_in // self.layers
        for start in range(0, len(self.W_enc), step):
            stop = min(start + step, len(self.W_enc))
            for layer in range(self.layers):
                latents = slice(start + layer, stop, self.layers)
                yield latents, slice(layer * read, (layer + 1) * read)

    def decoder_block(
        self, latents: slice | Int[Tensor, " some"], W_dec: Float[Tensor, "n_local written"]
    ) -> tuple[slice, Float[Tensor, "some columns"]]:
        """Return the target columns that these latents write, and their decoder rows there.

        Args:
            latents: A slice from `tiles`, or latents of a block of `products`.
            W_dec: The decoder, or a tensor with its layout. For a slice, a view of it is returned.
        """
        return slice(None), W_dec[latents]

    def decoder_rows(
        self, latents: slice | Int[Tensor, " some"] = slice(None)
    ) -> Float[Tensor, "some d_out"]:
        """Return the vectors over all sites that latents add to the targets at activation 1."""
        return self.W_dec[latents]
