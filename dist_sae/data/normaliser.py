"""Computation of each site's normaliser from the sums in the manifests."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from dist_sae.data.activation_set import ActivationSet
from dist_sae.dictionaries.normaliser import Normaliser
from dist_sae.errors import NonFiniteError


def measure(
    activations: ActivationSet,
    at_least_rows: int,
    on_wait: Callable[[float], None] = lambda _: None,
) -> dict[str, Normaliser]:
    """Compute each site's normaliser from the first training units.

    Args:
        at_least_rows: Number of rows that is enough. If the set has fewer, all units are used.
        on_wait: Callback for the seconds waited so far for a unit.

    Returns:
        The normaliser of each of the reader's sites, all from the same rows.

    Raises:
        NonFiniteError: The activations of a site do not vary, so there is nothing to learn.
        CorruptObjectError: The sites of a unit have different numbers of rows.
    """
    rows, sums, squares = 0, dict[str, Tensor](), dict.fromkeys(activations.sites, 0.0)
    for unit in activations.plan.train_units:
        manifest = activations.manifest(unit, on_wait)
        for site, shard in activations.shards(manifest).items():
            of_unit = torch.tensor(shard.sum, dtype=torch.float64)
            sums[site] = sums[site] + of_unit if rows else of_unit
            squares[site] += shard.sum_squares
        rows += manifest.rows
        if rows >= at_least_rows:
            break
    place = activations.store.url
    return {
        site: _normaliser(f"{place}: {site}", sums[site], squares[site], rows)
        for site in activations.sites
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
