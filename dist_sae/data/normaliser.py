"""One constant scale for all activations of a site, from the manifests' sums."""

from collections.abc import Callable, Mapping
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
    """How many rows it was measured on."""

    def to_scalars(self) -> dict[str, Any]:
        """For a checkpoint; `from_scalars` gives it back exactly."""
        return {**self._asdict(), "mean": self.mean.tolist()}

    @classmethod
    def from_scalars(cls, scalars: Mapping[str, Any]) -> "Normaliser":
        """What `to_scalars` made of it."""
        mean = torch.tensor(scalars["mean"], dtype=torch.float64)
        return cls(scalars["scale"], mean, scalars["variance"], scalars["rows"])

    def at(self, scale: float) -> "Normaliser":
        """The same measurement with another scale."""
        change = scale / self.scale
        return Normaliser(scale, self.mean * change, self.variance * change**2, self.rows)


def measure(
    units: ActivationSet, at_least_rows: int, waiting: Callable[[float], None] = lambda _: None
) -> Normaliser:
    """Measure the first training units that together have `at_least_rows` rows (or all of them).

    Args:
        units: The activation set.
        at_least_rows: How many rows are enough.
        waiting: Told now and then for how many seconds a unit has been missing.

    Raises:
        NonFiniteError: The activations do not vary, so there is nothing to learn.
    """
    rows, total, squares = 0, torch.zeros(0, dtype=torch.float64), 0.0
    for unit in units.plan.train_units:
        manifest = units.manifest(unit, waiting)
        shard = units.shard(manifest)
        sums = torch.tensor(shard.sum, dtype=torch.float64)
        total = sums if not rows else total + sums
        squares += shard.sum_squares
        rows += manifest.rows
        if rows >= at_least_rows:
            break
    mean, mean_square = total / max(rows, 1), squares / max(rows, 1)
    variance = mean_square - float(mean.square().sum())
    if not variance > 1e-12 * mean_square:
        raise NonFiniteError(
            f"{units.store.url}: the activations do not vary "
            f"(variance {variance:.3g} over {rows} rows); check the model and the site"
        )
    scale = (len(mean) / mean_square) ** 0.5
    return Normaliser(scale, mean * scale, variance * scale**2, rows)
