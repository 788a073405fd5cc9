"""A trained dictionary as a torch module on raw activations."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, overload

import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.interface import Codes
from dist_sae.errors import ArgumentError, LatentNotFoundError
from dist_sae.kernels import Entries
from dist_sae.notebook.steering import Positions, Where, editing
from dist_sae.notebook.texts import TextReader, TokenLatents, strongest

RawRows = Float[Tensor, "*rows d_in"] | NDArray[Any]
Latents = int | Sequence[int] | Int[Tensor, "..."]
"""Numbers of one or several latents."""


class SparseCodes(NamedTuple):
    """The active entries of codes `[*rows, n_latents]`: row after row, latents ascending."""

    acts: Float[Tensor, " entries"]
    """Activations, above 0."""
    latents: Int[Tensor, " entries"]
    rows: Int[Tensor, " entries"]
    """Row of each entry; leading dimensions are counted as one."""
    shape: tuple[int, ...]
    """Shape of the dense codes: `(*rows, n_latents)`."""

    @property
    def counts(self) -> Int[Tensor, " rows"]:
        """Number of active latents of each row."""
        return torch.bincount(self.rows, minlength=math.prod(self.shape[:-1]))

    def dense(self) -> Float[Tensor, "*rows n_latents"]:
        """Codes with their zeros: rows times n_latents numbers."""
        codes = self.acts.new_zeros(math.prod(self.shape[:-1]), self.shape[-1])
        return codes.index_put((self.rows, self.latents), self.acts).view(self.shape)

    def csr(self) -> Tensor:
        """A `torch.sparse_csr` tensor `[rows, n_latents]`."""
        counts = self.counts
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        size = (len(counts), self.shape[-1])
        return torch.sparse_csr_tensor(starts, self.latents, self.acts, size)

    @classmethod
    def of(cls, codes: Codes, shape: tuple[int, ...]) -> "SparseCodes":
        """The active entries of a dictionary's codes, whose dense shape is given."""
        rows = Entries(codes.latents, codes.starts, shape[-1]).rows
        on = codes.acts > 0
        acts, latents, rows = codes.acts[on], codes.latents[on].long(), rows[on]
        order = (rows * shape[-1] + latents).argsort()
        return cls(acts[order], latents[order], rows[order], shape)


class RawDictionary(nn.Module):
    """A trained dictionary that takes and gives raw activations, as the model has them.

    The factor s between them and the activations that it was trained on is inside:

        f     = codes of s x, as at inference
        x_hat = W_dec^T f + b_dec

    f is in the scale of training, as in reports. `W_dec` and `b_dec` are those of training over s;
    `W_enc` is s times that of training, and `b_enc` is unchanged. A pre-activation is `W_enc` x +
    `b_enc`, or `W_enc` (x - `b_dec`) + `b_enc` in a recipe that centres its inputs.

    The parameters are frozen. `encode` and `forward` give no gradients; `decode` gives those of the
    codes. `to` moves it between devices; arguments are moved to its device.

    Attributes:
        sae: The dictionary, on scaled activations.
        scale: s.
        site: Where it reads activations.
        step: Training step of its checkpoint.
        mean: Mean of the raw activations.
        idle_rows: Rows since each latent last fired, at the end of training.
    """

    mean: Float[Tensor, " d_in"]
    idle_rows: Int[Tensor, " n_latents"]

    def __init__(
        self,
        sae: Dictionary,
        scale: float,
        site: str,
        step: int,
        mean: Float[Tensor, " d_in"],
        idle_rows: Int[Tensor, " n_latents"],
        reader: Callable[[], TextReader],
    ) -> None:
        """Wrap a dictionary; see the attributes, and `OpenedRun.dictionary`, which does it.

        Args:
            sae: Frozen by this.
            reader: Loads the language model and its tokenizer, for `active_on`.
        """
        super().__init__()
        self.sae = sae.requires_grad_(requires_grad=False).eval()
        self.scale = scale
        self.site = site
        self.step = step
        self.register_buffer("mean", mean)
        self.register_buffer("idle_rows", idle_rows)
        self._reader = reader

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.sae.widths.d_in

    @property
    def n_latents(self) -> int:
        """Width of the dictionary."""
        return self.sae.n_latents

    @property
    def W_dec(self) -> Float[Tensor, "n_latents d_in"]:  # noqa: N802 - the field's names
        """Decoder, for raw activations; made anew each time: `decoder_rows` gives some rows."""
        return self.sae.decoder_rows() / self.scale

    @property
    def b_dec(self) -> Float[Tensor, " d_in"]:
        """Bias of the decoder, for raw activations."""
        return self.sae.b_dec / self.scale

    @property
    def W_enc(self) -> Float[Tensor, "n_latents d_in"]:  # noqa: N802
        """Encoder, for raw activations; made anew each time."""
        return self.sae.W_enc * self.scale

    @property
    def b_enc(self) -> Float[Tensor, " n_latents"]:
        """Bias of the encoder."""
        return self.sae.b_enc

    def decoder_rows(self, latents: Latents) -> Float[Tensor, "latents d_in"]:
        """Raw activations that an activation of 1 of each latent adds.

        Raises:
            LatentNotFoundError: There is no such latent.
        """
        return self.sae.decoder_rows(self.check_latents(latents)) / self.scale

    @overload
    def encode(self, x: RawRows, *, dense: Literal[False] = False) -> SparseCodes: ...
    @overload
    def encode(self, x: RawRows, *, dense: Literal[True]) -> Float[Tensor, "*rows n_latents"]: ...

    @torch.no_grad()
    def encode(
        self, x: RawRows, *, dense: bool = False
    ) -> SparseCodes | Float[Tensor, "*rows n_latents"]:
        """Encode raw activations, in the precision of the parameters. No gradients.

        Args:
            x: Raw activations.
            dense: Return a matrix of all codes instead of the active entries.

        Raises:
            ArgumentError: They have another width than the dictionary.
        """
        x = self._tensor(x, self.d_in, "activations")
        codes = self.sae.encode(x.reshape(-1, self.d_in) * self.scale)
        found = SparseCodes.of(codes, (*x.shape[:-1], self.n_latents))
        return found.dense() if dense else found

    def decode(
        self, codes: SparseCodes | Float[Tensor, "*rows n_latents"], x: RawRows | None = None
    ) -> Float[Tensor, "*rows d_out"]:
        """Reconstruct raw activations from codes; differentiable in these.

        Args:
            codes: As from `encode`.
            x: The raw activations that they are of; only a transcoder with a skip needs them.

        Raises:
            ArgumentError: The codes are of another dictionary: they have another width. Or x is
                needed.
        """
        offset: Tensor = self.sae.b_dec
        if self.sae.config.skips:
            if x is None:
                raise ArgumentError(
                    "the dictionary has a linear skip: give decode the activations as well"
                )
            x = self._tensor(x, self.d_in, "activations")
            offset = self.sae.offset(x.reshape(-1, self.d_in) * self.scale)
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
        return (parts + offset) / self.scale

    @torch.no_grad()
    def forward(self, x: RawRows) -> Float[Tensor, "*rows d_in"]:
        """Reconstruct raw activations: `decode(encode(x))` in bounded memory. No gradients.

        Raises:
            ArgumentError: They have another width than the dictionary.
        """
        x = self._tensor(x, self.d_in, "activations")
        x_hat = self.sae.infer(x.reshape(-1, self.d_in) * self.scale).x_hat
        return (x_hat / self.scale).view(*x.shape[:-1], -1)

    def active_on(self, text: str, top: int = 5) -> list[TokenLatents]:
        """Find the strongest latents on each token of a text, as training saw such text.

        Loads the language model up to the site, once per run. A text longer than a context is read
        as several, with a warning.

        Args:
            text: Any text.
            top: Most latents of a token.

        Raises:
            ArgumentError: The text has no tokens.
            ConfigError: The run's activations are not of a language model.
            ModelError: The model is not where the run file says.
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
        """Add a latent's decoder row to a model's activations, within a `with` block.

            x + strength W_dec[latent]

        Args:
            model: A `transformers` model, with or without a head.
            latent: Its number.
            strength: How much higher its activation is to look.
            positions: Mask of the tokens that are changed, `[seq]` or `[batch, seq]`, from the
                first of a sequence on, padding included; all if None.
            generated: Whether tokens after the last of `positions` are changed.

        Raises:
            LatentNotFoundError: There is no such latent.
            ArgumentError: The model has another width.
            ModelError: The model has no such site.
        """
        row = self.decoder_rows(latent)[0]

        def change(x: Tensor) -> Tensor:
            return (strength * row).expand(x.shape)

        where = Where(positions, generated=generated)
        return editing(model, self.site, self.d_in, change, where)

    def clamp(
        self,
        model: nn.Module,
        values: Mapping[int, float],
        positions: Positions | None = None,
        *,
        generated: bool = True,
    ) -> AbstractContextManager[None]:
        """Set latents' activations to values, within a `with` block; keeps the error.

            x + sum_i (value_i - a_i) W_dec[i],  a_i the activation of latent i on x

        What the dictionary does not reconstruct, and all other latents, stay as they are. Gradients
        of a_i are not followed.

        Args:
            model: As in `steer`.
            values: Activation that each latent gets.
            positions: As in `steer`.
            generated: As in `steer`.

        Raises:
            LatentNotFoundError: There is no such latent.
            ArgumentError: The model has another width.
            ModelError: The model has no such site.
        """
        latents = self.check_latents(list(values))
        directions = self.decoder_rows(list(values))
        wanted = directions.new_tensor(list(values.values()))
        columns = torch.full((self.n_latents,), -1, device=latents.device)
        columns[latents] = torch.arange(len(latents), device=latents.device)

        def change(x: Tensor) -> Tensor:
            codes = self.encode(x)
            column = columns[codes.latents]
            ours = column >= 0
            acts = wanted.new_zeros(len(x), len(wanted))
            acts[codes.rows[ours], column[ours]] = codes.acts[ours].to(acts.dtype)
            return (wanted - acts) @ directions

        where = Where(positions, generated=generated)
        return editing(model, self.site, self.d_in, change, where)

    def ablate(
        self,
        model: nn.Module,
        latents: Latents,
        positions: Positions | None = None,
        *,
        generated: bool = True,
    ) -> AbstractContextManager[None]:
        """Remove latents' contributions, within a `with` block: `clamp` at 0.

        Where none of them is active, nothing changes, bit for bit.
        """
        zeros = dict.fromkeys(self.check_latents(latents).tolist(), 0.0)
        return self.clamp(model, zeros, positions, generated=generated)

    def check_latents(self, latents: Latents) -> Int[Tensor, " latents"]:
        """Return latents' numbers as a tensor.

        Raises:
            LatentNotFoundError: There is no such latent.
        """
        numbers = torch.as_tensor(latents, dtype=torch.int64).reshape(-1)
        for latent in numbers[(numbers < 0) | (numbers >= self.n_latents)].tolist():
            raise LatentNotFoundError(
                f"latent {latent}: the dictionary has latents 0 to {self.n_latents - 1}"
            )
        return numbers.to(self.sae.W_dec.device)

    def _tensor(self, x: RawRows, width: int, what: str) -> Tensor:
        tensor = torch.as_tensor(x)
        if not tensor.dim() or tensor.shape[-1] != width:
            raise _wrong_width(what, tensor.shape[-1] if tensor.dim() else 0, width)
        return tensor.to(self.sae.W_dec.device, self.sae.W_dec.dtype)

    def extra_repr(self) -> str:
        """Facts that `print` shows."""
        return f"{self.n_latents} latents, d_in={self.d_in}, {self.site}, step {self.step}"


def _wrong_width(what: str, found: int, wanted: int) -> ArgumentError:
    return ArgumentError(f"{what} are {found} wide, the dictionary takes {wanted}: [..., {wanted}]")
