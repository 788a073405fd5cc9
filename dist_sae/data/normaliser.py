"""One constant scale for all activations of a site, from the sums in the manifests."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dist_sae.data.activation_set import ActivationSet
from dist_sae.errors import NonFiniteError


class Normaliser(NamedTuple):
    """Activations are multiplied by `scale`, so that E|x|^2 = d_in (Scaling Monosemanticity)."""

    scale: float
    mean: Float[Tensor, " d_in"]
    """Mean of the scaled activations, fp64."""
    variance: float
    """E|x - mean|^2 of the scaled activations, summed over the dimensions."""
    rows: int
    """Rows that it was measured on."""

    def to_scalars(self) -> dict[str, Any]:
        """For a checkpoint; `from_scalars` gives it back exactly."""
        return {**self._asdict(), "mean": self.mean.tolist()}

    @classmethod
    def from_scalars(cls, scalars: Mapping[str, Any]) -> "Normaliser":
        """Read what `to_scalars` wrote."""
        mean = torch.tensor(scalars["mean"], dtype=torch.float64)
        return cls(scalars["scale"], mean, scalars["variance"], scalars["rows"])

    def at(self, scale: float) -> "Normaliser":
        """The same measurement with another scale."""
        change = scale / self.scale
        return Normaliser(scale, self.mean * change, self.variance * change**2, self.rows)


def measure(
    activations: ActivationSet,
    at_least_rows: int,
    waiting: Callable[[float], None] = lambda _: None,
    sites: Sequence[str] | None = None,
) -> dict[str, Normaliser]:
    """Measure the first training units that together have `at_least_rows` rows, or all of them.

    Args:
        at_least_rows: How many rows are enough.
        waiting: Called now and then with the seconds that a unit has been missing.
        sites: What to measure; None: the reader's site.

    Returns:
        The normaliser of each site, all of the same rows. Every manifest is read once.

    Raises:
        NonFiniteError: The activations of a site do not vary, so there is nothing to learn.
    """
    sites = (activations.site,) if sites is None else sites
    rows, sums, squares = 0, dict[str, Tensor](), dict.fromkeys(sites, 0.0)
    for unit in activations.plan.train_units:
        manifest = activations.manifest(unit, waiting)
        for site in sites:
            shard = manifest.sites[site]
            of_unit = torch.tensor(shard.sum, dtype=torch.float64)
            sums[site] = sums[site] + of_unit if rows else of_unit
            squares[site] += shard.sum_squares
        rows += manifest.rows
        if rows >= at_least_rows:
            break
    place = activations.store.url
    return {
        site: _normaliser(f"{place}: {site}", sums[site], squares[site], rows) for site in sites
    }


def _normaliser(name: str, total: Float[Tensor, " d_in"], squares: float, rows: int) -> Normaliser:
    mean, mean_square = total / max(rows, 1), squares / max(rows, 1)
    variance = mean_square - float(mean.square().sum())
    if not variance > 1e-12 * mean_square:
        raise NonFiniteError(
            f"{name}: the activations do not vary (variance {variance:.3g} over {rows} rows); "
            f"check the model and the site"
        )
    scale = (len(mean) / mean_square) ** 0.5
    return Normaliser(scale, mean * scale, variance * scale**2, rows)
