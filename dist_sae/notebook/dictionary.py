"""A trained dictionary as a torch module for raw activations."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, overload

import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from dist_sae.config.run import describe_sites
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.normaliser import SiteNormalisers
from dist_sae.errors import ArgumentError, LatentNotFoundError
from dist_sae.kernels import Entries
from dist_sae.notebook.codes import SparseCodes
from dist_sae.notebook.steering import Positions, TokenMask, edit_activations
from dist_sae.notebook.texts import TextReader, TokenLatents, strongest

RawRows = Float[Tensor, "*rows d"] | NDArray[Any]
Inputs = RawRows | Mapping[str, RawRows]
"""Raw activations of the sites that a dictionary reads: concatenated, or a mapping by site."""
Latents = int | Sequence[int] | Int[Tensor, "..."]
"""Index of one latent, or of several."""


class RawDictionary(nn.Module):
    """A trained dictionary that reads and reconstructs the model's raw activations.

    Training scales the activations of each site by a constant s. This module applies s itself:

        f     = codes of s x, selected as at inference
        x_hat = W_dec^T f + b_dec

    The codes f have the scale of training, as in reports. `W_dec` and `b_dec` are the trained ones
    divided by s, `W_enc` is the trained one times s, and `b_enc` is the trained one. A
    pre-activation is `W_enc` x + `b_enc`, or `W_enc` (x - `b_dec`) + `b_enc` if the recipe centers
    its inputs.

    Activations of several sites are concatenated in the order of `reads` or `writes`.

    The parameters are frozen. `encode` and `forward` have no gradients. `decode` is differentiable
    with respect to the codes. `to` moves the module to a device; inputs are then moved there too.

    Attributes:
        sae: The dictionary for scaled activations.
        scales: The factor s of each site.
        reads: Sites whose activations are encoded.
        writes: Sites whose activations are reconstructed.
        step: Training step of the checkpoint.
        mean: Mean of the raw activations of the reconstructed sites.
        idle_rows: Number of rows since each latent last fired, at that step.
    """

    mean: Float[Tensor, " d_out"]
    idle_rows: Int[Tensor, " n_latents"]
    read_scales: Float[Tensor, " d_in"]
    """The factor s of each column of the inputs."""
    write_scales: Float[Tensor, " d_out"]

    def __init__(
        self,
        sae: Dictionary,
        normalisers: SiteNormalisers,
        step: int,
        idle_rows: Int[Tensor, " n_latents"],
        reader: Callable[[], TextReader],
    ) -> None:
        """Wrap a dictionary. Use `OpenedRun.dictionary` instead of calling this.

        Args:
            sae: The dictionary, whose parameters this call freezes.
            normalisers: Normalisers of the dictionary's sites.
            step: See the attribute.
            idle_rows: See the attribute.
            reader: Function that loads the language model and its tokenizer for `active_on`.
        """
        super().__init__()
        self.sae = sae.requires_grad_(requires_grad=False).eval()
        self.scales = {site: of.scale for site, of in normalisers.by_site.items()}
        self.reads, self.writes = normalisers.reads, normalisers.writes
        self.step = step
        dtype = sae.b_dec.dtype
        for name, sites, widths in (
            ("read_scales", self.reads, normalisers.widths.reads),
            ("write_scales", self.writes, normalisers.widths.writes),
        ):
            each = torch.tensor([self.scales[site] for site in sites], dtype=dtype)
            columns = each.repeat_interleave(torch.tensor(widths))
            self.register_buffer(name, columns, persistent=False)
        self.register_buffer("mean", normalisers.mean.to(dtype) / self.write_scales)
        self.register_buffer("idle_rows", idle_rows)
        self._reader = reader

    @property
    def d_in(self) -> int:
        """Width of the input: the widths of the read sites, added up."""
        return self.sae.widths.d_in

    @property
    def n_latents(self) -> int:
        """Number of latents in the dictionary."""
        return self.sae.n_latents

    @property
    def W_dec(self) -> Float[Tensor, "n_latents d_out"]:  # noqa: N802 - the field's names
        """Decoder for raw activations, computed on each access; see `decoder_rows` for a few."""
        return self.sae.decoder_rows() / self.write_scales

    @property
    def b_dec(self) -> Float[Tensor, " d_out"]:
        """Decoder bias for raw activations."""
        return self.sae.b_dec / self.write_scales

    @property
    def W_enc(self) -> Float[Tensor, "n_latents d_in"]:  # noqa: N802
        """Encoder for raw activations, computed on each access."""
        W_enc = self.read_scales.new_zeros(self.n_latents, self.d_in)
        for latents, columns in self.sae.tiles(self.n_latents):
            W_enc[latents, columns] = self.sae.W_enc[latents]
        return W_enc * self.read_scales

    @property
    def b_enc(self) -> Float[Tensor, " n_latents"]:
        """Encoder bias."""
        return self.sae.b_enc

    def decoder_rows(self, latents: Latents) -> Float[Tensor, "latents d_out"]:
        """Return the decoder rows of some latents, for raw activations.

        A latent with activation 1 adds its row to the reconstruction.

        Raises:
            LatentNotFoundError: A latent is not in the dictionary.
        """
        return self.sae.decoder_rows(self.check_latents(latents)) / self.write_scales

    @overload
    def encode(self, x: Inputs, *, dense: Literal[False] = False) -> SparseCodes: ...
    @overload
    def encode(self, x: Inputs, *, dense: Literal[True]) -> Float[Tensor, "*rows n_latents"]: ...

    @torch.no_grad()
    def encode(
        self, x: Inputs, *, dense: bool = False
    ) -> SparseCodes | Float[Tensor, "*rows n_latents"]:
        """Encode raw activations in the precision of the parameters. No gradients.

        Args:
            x: Raw activations, concatenated over sites or as a mapping by site.
            dense: Return a matrix of all codes instead of the active entries.

        Raises:
            ArgumentError: The width of x differs from the dictionary's d_in.
        """
        x = self._inputs(x)
        codes = self.sae.encode(x.reshape(-1, self.d_in) * self.read_scales)
        found = SparseCodes.of(codes, (*x.shape[:-1], self.n_latents))
        return found.dense() if dense else found

    def decode(
        self, codes: SparseCodes | Float[Tensor, "*rows n_latents"], x: Inputs | None = None
    ) -> Float[Tensor, "*rows d_out"]:
        """Reconstruct raw activations from codes. Differentiable with respect to the codes.

        Args:
            codes: Codes from `encode`, sparse or dense.
            x: The raw activations that were encoded. Only a transcoder with a skip needs them.

        Raises:
            ArgumentError: The width of the codes differs from n_latents, or x is missing.
        """
        offset: Tensor = self.sae.b_dec
        if self.sae.config.has_skip:
            if x is None:
                raise ArgumentError(
                    "the dictionary has a linear skip, so decode also needs the activations x"
                )
            x = self._inputs(x)
            offset = self.sae.offset(x.reshape(-1, self.d_in) * self.read_scales)
            offset = offset.view(*x.shape[:-1], -1)
        if isinstance(codes, SparseCodes):
            if codes.shape[-1] != self.n_latents:
                raise _wrong_width("codes", codes.shape[-1], self.n_latents)
            device, counts = self.sae.W_dec.device, codes.counts
            starts = (counts.cumsum(0) - counts).to(device)
            latents, acts = codes.latents.to(device), codes.acts.to(device)
            entries = Entries(latents, starts, self.n_latents)
            parts = self.sae.decode_at(acts, entries, self.sae.W_dec)
            parts = parts.view(*codes.shape[:-1], -1)
        else:
            parts = self._tensor(codes, self.n_latents, "codes") @ self.sae.decoder_rows()
        return (parts + offset) / self.write_scales

    @torch.no_grad()
    def forward(self, x: Inputs) -> Float[Tensor, "*rows d_out"]:
        """Reconstruct raw activations, as `decode(encode(x))` but in bounded memory. No gradients.

        Args:
            x: Raw activations, concatenated over sites or as a mapping by site.

        Raises:
            ArgumentError: The width of x differs from the dictionary's d_in.
        """
        x = self._inputs(x)
        x_hat = self.sae.infer(x.reshape(-1, self.d_in) * self.read_scales).x_hat
        return (x_hat / self.write_scales).view(*x.shape[:-1], -1)

    def active_on(self, text: str, top: int = 5) -> list[TokenLatents]:
        """Find the strongest latents on each token of a text, which is read as in training.

        The first call loads the language model up to the site. A text that is longer than a context
        is cut into several contexts, with a warning.

        Args:
            text: Any text.
            top: Maximum number of latents per token.

        Raises:
            ArgumentError: The text has no tokens.
            ConfigError: The run's activations are synthetic.
            ModelError: The language model cannot be loaded.
        """
        rows = self._reader().read(text)
        return strongest(rows, self.encode(rows.acts), top)

    def steer(
        self,
        model: nn.Module,
        latent: int,
        strength: float,
        positions: Positions | None = None,
        *,
        generated: bool = True,
    ) -> AbstractContextManager[None]:
        """Add a latent's decoder row to a model's activations within a `with` block.

            x + strength W_dec[latent]

        Args:
            model: A `transformers` model, with or without a head.
            latent: Index of the latent.
            strength: Amount by which the latent's activation seems to rise.
            positions: Mask of the tokens to change, `[seq]` or `[batch, seq]`. It starts at the
                first token of a sequence and includes padding. None changes all tokens.
            generated: Whether to change tokens after the end of `positions`.

        Raises:
            LatentNotFoundError: The latent is not in the dictionary.
            ArgumentError: The width of the model differs from the dictionary's.
            ModelError: The model does not have the site.
        """
        row = self.decoder_rows(latent)
        where, site = TokenMask(positions, generated=generated), self.site
        return edit_activations(model, site, self._widths(site), lambda _: strength * row, where)

    def clamp(
        self,
        model: nn.Module,
        values: Mapping[int, float],
        positions: Positions | None = None,
        *,
        generated: bool = True,
    ) -> AbstractContextManager[None]:
        """Set latents' activations to given values within a `with` block.

            x + sum_i (value_i - a_i) W_dec[i],  where a_i is the activation of latent i on x

        The reconstruction error and all other latents stay the same. No gradient flows through a_i.

        Args:
            model: See `steer`.
            values: The new activation of each latent, by its index.
            positions: See `steer`.
            generated: See `steer`.

        Raises:
            LatentNotFoundError: A latent is not in the dictionary.
            ArgumentError: The width of the model differs from the dictionary's.
            ModelError: The model does not have a site of the dictionary.
        """
        latents = self.check_latents(list(values))
        directions = self.decoder_rows(list(values))
        wanted = directions.new_tensor(list(values.values()))
        columns = torch.full((self.n_latents,), -1, device=latents.device)
        columns[latents] = torch.arange(len(latents), device=latents.device)

        def change(read: Mapping[str, Tensor]) -> Tensor:
            codes = self.encode(read)
            column = columns[codes.latents]
            ours = column >= 0
            acts = wanted.new_zeros(codes.shape[0], len(wanted))
            acts[codes.rows[ours], column[ours]] = codes.acts[ours].to(acts.dtype)
            return (wanted - acts) @ directions

        where, site = TokenMask(positions, generated=generated), self.site
        return edit_activations(model, site, self._widths(site, *self.reads), change, where)

    def ablate(
        self,
        model: nn.Module,
        latents: Latents,
        positions: Positions | None = None,
        *,
        generated: bool = True,
    ) -> AbstractContextManager[None]:
        """Remove latents' contributions within a `with` block, as `clamp` to 0 does.

        Activations on which none of the latents is active stay the same, bit for bit.
        """
        zeros = dict.fromkeys(self.check_latents(latents).tolist(), 0.0)
        return self.clamp(model, zeros, positions, generated=generated)

    def check_latents(self, latents: Latents) -> Int[Tensor, " latents"]:
        """Return latent indices as a tensor, after checking them.

        Raises:
            LatentNotFoundError: A latent is not in the dictionary.
        """
        numbers = torch.as_tensor(latents, dtype=torch.int64).reshape(-1)
        for latent in numbers[(numbers < 0) | (numbers >= self.n_latents)].tolist():
            raise LatentNotFoundError(
                f"latent {latent}: the dictionary has latents 0 to {self.n_latents - 1}"
            )
        return numbers.to(self.sae.W_dec.device)

    @property
    def site(self) -> str:
        """The site that the dictionary writes, which steering changes.

        Raises:
            ArgumentError: The dictionary writes several sites.
        """
        if len(self.writes) > 1:
            raise ArgumentError(
                f"the dictionary writes {', '.join(self.writes)}, but a model can be changed "
                f"at one site only"
            )
        return self.writes[0]

    def _widths(self, *sites: str) -> dict[str, int]:
        reads, writes = self.sae.widths
        known = dict(zip(self.reads + self.writes, reads + writes, strict=True))
        return {site: known[site] for site in sites}

    def _inputs(self, x: Inputs) -> Tensor:
        """Concatenate the raw activations of the read sites, and check their widths."""
        if not isinstance(x, Mapping):
            return self._tensor(x, self.d_in, "activations")
        if missing := [site for site in self.reads if site not in x]:
            raise ArgumentError(
                f"activations: {missing[0]} is missing; the dictionary reads "
                f"{', '.join(self.reads)}"
            )
        widths = self._widths(*self.reads).items()
        parts = [self._tensor(x[site], width, f"activations at {site}") for site, width in widths]
        return torch.cat(parts, -1)

    def _tensor(self, x: RawRows, width: int, what: str) -> Tensor:
        tensor = torch.as_tensor(x)
        if not tensor.dim() or tensor.shape[-1] != width:
            raise _wrong_width(what, tensor.shape[-1] if tensor.dim() else 0, width)
        return tensor.to(self.sae.W_dec.device, self.sae.W_dec.dtype)

    def extra_repr(self) -> str:
        """Return the description that `print` shows."""
        sites = describe_sites(self.reads, self.writes)
        return f"{self.n_latents} latents, d_in={self.d_in}, {sites}, step {self.step}"


def _wrong_width(what: str, found: int, wanted: int) -> ArgumentError:
    return ArgumentError(
        f"{what} have width {found}, but the dictionary takes {wanted}: [..., {wanted}]"
    )
