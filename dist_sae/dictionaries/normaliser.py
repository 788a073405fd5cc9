"""Normalisers: constant scales of activations per site, which turn activations into rows."""

from collections.abc import Hashable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dist_sae.device import moved
from dist_sae.dictionaries.interface import Rows, Widths

_SEVERAL = "normalisers"


class Normaliser(NamedTuple):
    """A site's `scale`, by which activations are multiplied, and statistics of the result.

    The scale is such that E|x|^2 = d_in (Scaling Monosemanticity).
    """

    scale: float
    mean: Float[Tensor, " d_in"]
    """Mean of the scaled activations, fp64."""
    variance: float
    """E|x - mean|^2 of the scaled activations, summed over the dimensions."""
    rows: int
    """Number of rows that the normaliser was measured on."""

    def to_scalars(self) -> dict[str, Any]:
        """Return the fields for a checkpoint. `from_scalars` restores them exactly."""
        return {**self._asdict(), "mean": self.mean.tolist()}

    @classmethod
    def from_scalars(cls, scalars: Mapping[str, Any]) -> "Normaliser":
        """Read what `to_scalars` wrote."""
        mean = torch.tensor(scalars["mean"], dtype=torch.float64)
        return cls(scalars["scale"], mean, scalars["variance"], scalars["rows"])

    def at_scale(self, scale: float) -> "Normaliser":
        """Return this measurement, converted to another scale."""
        change = scale / self.scale
        return Normaliser(scale, self.mean * change, self.variance * change**2, self.rows)


class SiteNormalisers(NamedTuple):
    """Normalisers of the sites that a dictionary reads and writes."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    by_site: Mapping[str, Normaliser]
    """Normaliser of each site, by name. A site that is read and written is in it once."""

    @property
    def key(self) -> Hashable:
        """Identity for caching: equal keys turn the same activations into the same rows."""
        return self.reads, self.writes, *((site, own.scale) for site, own in self.by_site.items())

    @property
    def widths(self) -> Widths:
        """Widths of the sites that are read and written."""
        return Widths(
            *(
                tuple(len(self.by_site[s].mean) for s in sites)
                for sites in (self.reads, self.writes)
            )
        )

    @property
    def mean(self) -> Float[Tensor, " d_out"]:
        """Mean of the targets, fp64."""
        return torch.cat([self.by_site[site].mean for site in self.writes])

    @property
    def variance(self) -> float:
        """Variance of the targets: the sum over the written sites."""
        return sum(self.by_site[site].variance for site in self.writes)

    @property
    def columns(self) -> dict[str, slice]:
        """Target columns of each written site."""
        ends = list(accumulate(self.widths.writes, initial=0))
        return {site: slice(*at) for site, *at in zip(self.writes, ends, ends[1:], strict=False)}

    def rows(self, acts: Mapping[str, Tensor], device: torch.device | str = "cpu") -> Rows:
        """Scale activations [batch, d_site] of the sites. An autoencoder's targets are its inputs.

        Returns:
            Rows in fp32 on the device, with the sites concatenated along dim 1.
        """
        inputs = self.inputs(acts, device)
        same = self.reads == self.writes
        return Rows(inputs, inputs if same else self.targets(acts, device))

    def inputs(
        self, acts: Mapping[str, Tensor], device: torch.device | str = "cpu"
    ) -> Float[Tensor, "batch d_in"]:
        """Scale and concatenate activations of the sites that are read, as `rows` does."""
        return self._side_by_side(self.reads, acts, device)

    def targets(
        self, acts: Mapping[str, Tensor], device: torch.device | str = "cpu"
    ) -> Float[Tensor, "batch d_out"]:
        """Scale and concatenate activations of the sites that are written, as `rows` does."""
        return self._side_by_side(self.writes, acts, device)

    def _side_by_side(
        self, sites: Sequence[str], acts: Mapping[str, Tensor], device: torch.device | str
    ) -> Tensor:
        widths = [acts[site].shape[1] for site in sites]
        n = len(acts[sites[0]])
        rows = torch.empty(n, sum(widths), dtype=torch.float32, device=device)
        for site, part in zip(sites, torch.split(rows, widths, 1), strict=True):
            here = moved(acts[site], device).to(torch.float32)
            torch.mul(here, self.by_site[site].scale, out=part)
        return rows

    def to_scalars(self) -> dict[str, Any]:
        """Return the normalisers for a checkpoint. `from_scalars` restores them exactly."""
        scalars = {site: normaliser.to_scalars() for site, normaliser in self.by_site.items()}
        return {_SEVERAL: scalars} if len(scalars) > 1 else scalars[self.reads[0]]

    @classmethod
    def from_scalars(
        cls, scalars: Mapping[str, Any], reads: tuple[str, ...], writes: tuple[str, ...]
    ) -> "SiteNormalisers":
        """Read what `to_scalars` wrote."""
        sites = dict.fromkeys((*reads, *writes))
        by_site = {site: Normaliser.from_scalars(_of_site(scalars, site)) for site in sites}
        return cls(reads, writes, by_site)

    def at_scales(self, scalars: Mapping[str, Any]) -> "SiteNormalisers":
        """Return these measurements, converted to the scales that a checkpoint was trained with."""
        by_site = {
            site: own.at_scale(_of_site(scalars, site)["scale"])
            for site, own in self.by_site.items()
        }
        return self._replace(by_site=by_site)


def _of_site(scalars: Mapping[str, Any], site: str) -> Mapping[str, Any]:
    """Return a site's scalars. A checkpoint of a single site has them at its top level."""
    of_site: Mapping[str, Any] = scalars[_SEVERAL][site] if _SEVERAL in scalars else scalars
    return of_site


def scales_of(scalars: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a checkpoint's scalars that `at_scales` reads."""
    return {name: scalars[name] for name in (_SEVERAL, "scale") if name in scalars}
