"""A trained dictionary rescaled for raw activations x, for the export formats with one site.

With the scales s of what is read and s_out of what is written, and a factor u for each latent's
codes:

    f'    = u f
    z'    = (u s W_enc) x + u b_enc            thresholds and b_mag are multiplied by u too
    y_hat = (W_dec / (u s_out))^T f' + (s / s_out) W_skip x + b_dec / s_out

By default u is the length of the latent's decoder row, so that exported rows have length 1 / s_out.
With `unit_rows` u is that length / s_out, so that exported rows have length 1 and f' is the length
of the latent's contribution to the raw y_hat. If latents are selected by the rank of their codes,
or by one threshold for all, a separate factor per latent would change the selection. Then u uses
the mean length, and rows keep their relative lengths. A gated dictionary's r is unchanged.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dist_sae import __version__
from dist_sae.checkpoint.layout import Checkpoint
from dist_sae.checkpoint.pages import PagedDictionary
from dist_sae.checkpoint.piecewise import PiecewiseTensor, transposed
from dist_sae.checkpoint.trained import normalisers_of
from dist_sae.config import Run
from dist_sae.config.data import HuggingFaceModel

MEMORY_BYTES = 512 * 2**20
"""Limit for the weights in memory. With fp64 copies and a block of a transpose, below 2 GB."""


class RawDictionary:
    """A run's dictionary for raw activations, with one site read and one written.

    Vectors with one number per latent are read by the constructor. Matrices are read part by part,
    while their pieces are consumed.

    Args:
        run: The run as it was trained.
        checkpoint: The checkpoint with the weights.
        unit_rows: Whether exported decoder rows have length 1; otherwise 1 / s_out.
        one_threshold: Whether the format has one threshold for all latents.

    Raises:
        CorruptObjectError: The checkpoint is damaged. Consuming the pieces can raise this too.
    """

    def __init__(
        self,
        run: Run,
        checkpoint: Checkpoint,
        *,
        unit_rows: bool = False,
        one_threshold: bool = False,
    ) -> None:
        normalisers = normalisers_of(run, checkpoint)
        (self.d_in,), (self.d_out,) = normalisers.widths
        self.n_latents = run.sae.n_latents
        self._scale, self._out = (normalisers.by_site[s].scale for s in (*run.reads, *run.writes))
        self._paged = PagedDictionary(run.sae, normalisers.widths, checkpoint, MEMORY_BYTES)
        vectors: dict[str, list[Tensor]] = {}
        self.shared: dict[str, Tensor] = {}
        """b_dec, and W_skip if there is one, in fp64."""
        common_factor = one_threshold
        for page in self._paged.pages(leave_out={"W_enc"}):
            p = {name: t.detach().double() for name, t in page.tensors() if name != "W_enc"}
            found = {"norms": p["W_dec"].norm(dim=1).clamp_min(1e-30), "b_enc": p["b_enc"]}
            found |= {name: p[name] for name in ("b_mag", "r_mag") if name in p}
            thresholds = page.inference_thresholds(torch.float64)
            if thresholds is None:
                common_factor |= not page.unit_rows  # unit rows differ only by rounding
            else:
                found["threshold"] = thresholds
            for name, vector in found.items():
                vectors.setdefault(name, []).append(vector)
            self.shared = {"b_dec": p["b_dec"] / self._out}
            if "W_skip" in p:
                self.shared["W_skip"] = p["W_skip"] * (self._scale / self._out)
        per_latent = {name: torch.cat(parts) for name, parts in vectors.items()}
        norms = per_latent.pop("norms")
        if common_factor:
            norms = norms.mean().expand_as(norms)
        self._factors = norms / self._out if unit_rows else norms
        self.per_latent = {
            name: vector if name == "r_mag" else self._factors * vector
            for name, vector in per_latent.items()
        }
        """b_enc, and threshold, b_mag and r_mag if the recipe has them, in fp64."""

    def encoder(self, name: str, *, transpose: bool = False) -> PiecewiseTensor:
        """Return W_enc under this name in fp32, as [n_latents, d_in] or its transpose."""

        def rows(columns: slice) -> Iterator[Tensor]:
            for factors, part in self._matrix("W_enc"):
                yield (self._scale * (factors * part[:, columns].double())).float()

        if transpose:
            return transposed(name, (self.d_in, self.n_latents), rows)
        shape = (self.n_latents, self.d_in)
        return PiecewiseTensor(name, torch.float32, shape, lambda: rows(slice(None)))

    def decoder(self, name: str, *, transpose: bool = False) -> PiecewiseTensor:
        """Return W_dec under this name in fp32, as [n_latents, d_out] or its transpose."""

        def rows(columns: slice) -> Iterator[Tensor]:
            for factors, part in self._matrix("W_dec"):
                yield (part[:, columns].double() / (factors * self._out)).float()

        if transpose:
            return transposed(name, (self.d_out, self.n_latents), rows)
        shape = (self.n_latents, self.d_out)
        return PiecewiseTensor(name, torch.float32, shape, lambda: rows(slice(None)))

    def encoded_b_dec(self) -> Tensor:
        """Return the raw W_enc b_dec in fp64, which z loses when b_dec is subtracted from x."""
        b_dec = self._scale * self.shared["b_dec"]
        parts = self._matrix("W_enc")
        return torch.cat([factors[:, 0] * (part.double() @ b_dec) for factors, part in parts])

    def _matrix(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield factors [some, 1] and rows of some latents. The next rows may overwrite these."""
        first = 0
        for page in self._paged.pages(leave_out={"W_enc", "W_dec"} - {name}):
            rows = page.get_parameter(name).detach()
            yield self._factors[first : first + len(rows), None], rows
            first += len(rows)


def in_memory_tensor(name: str, tensor: Tensor) -> PiecewiseTensor:
    """Wrap a tensor that is already in memory. Floating-point tensors are converted to fp32."""
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    return PiecewiseTensor(name, tensor.dtype, tuple(tensor.shape), lambda: (tensor,))


def model_name(run: Run) -> str:
    """Return the model's name on the hub, its folder, or the kind of a synthetic model."""
    if run.export.model_name:
        return run.export.model_name
    if not isinstance(run.model, HuggingFaceModel):
        return run.model.kind
    return run.model.of_site(run.site)[0].path


def origin(run: Run, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the origin of an export, for a key of its config that the other library ignores."""
    scales = {s: own.scale for s, own in normalisers_of(run, checkpoint).by_site.items()}
    return {
        "version": __version__,
        "run": run.name,
        "kind": run.sae.kind,
        "model_name": model_name(run),
        "dataset": run.corpus.label,
        "reads": list(run.reads),
        "writes": list(run.writes),
        "activation_scales": scales,
        "trained_rows": checkpoint.step * run.train.batch_rows,
        "checkpoint": checkpoint.digest,
    }
