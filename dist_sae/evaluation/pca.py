"""FVU of a PCA, the baseline that a dictionary must beat."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.consumers import kept_units
from dist_sae.dictionaries.normaliser import SiteNormalisers
from dist_sae.evaluation.cache import cached, fingerprint

WIDEST = 16_384
"""Maximum width for a PCA. Its time grows with the cube of the width; this one takes 20 minutes."""
_PCA_ROWS = 100_000


def pca_fvu(
    activations: ActivationSet,
    normalisers: SiteNormalisers,
    limit: int,
    components: int,
    device: torch.device | str = "cpu",
) -> float:
    """Compute the FVU on held-out rows of a PCA fitted to training rows of the written sites.

    FVU is measured for all numbers of components at once, and cached for all dictionaries of these
    sites. If no training unit is left, the PCA is fitted to the held-out rows, which can only
    flatter it.

    Args:
        activations: The activation set.
        normalisers: Normalisers of the dictionary's sites. FVU is relative to their means.
        limit: Maximum number of held-out rows.
        components: Number of components.
        device: Device for the computation, which is in fp32.
    """
    plan, targets = activations.plan, activations.with_sites(*normalisers.writes)
    training = kept_units(activations.store, plan) or plan.heldout_units
    of = {
        "plan": plan.hash,
        "sites": targets.sites,
        "scales": [normalisers.by_site[site].scale for site in targets.sites],
        "mean": fingerprint(normalisers.mean.tolist()),
        "rows": limit,
        "training_rows": _PCA_ROWS,
        "training_units": [training.start, training.stop],
    }

    def measure() -> dict[str, list[float]]:
        rows, heldout = (
            (normalisers.targets(block, device) for block in blocks)
            for blocks in (targets.rows(training, _PCA_ROWS), targets.heldout_rows(limit))
        )
        directions = _principal_directions(rows)
        return {"fvu": _fvu_by_components(heldout, directions, normalisers.mean.to(directions))}

    by_components: list[float] = cached(activations.store, "pca", of, measure)["fvu"]
    return by_components[components]


def _principal_directions(batches: Iterator[Tensor]) -> Float[Tensor, "d_in d_in"]:
    """Compute the eigenvectors of the rows' covariance about their mean, leading one first."""
    rows, total, products = 0, torch.zeros(()), torch.zeros(())
    for x in batches:
        rows += len(x)
        total = total + x.double().sum(0)
        products = products + (x.T @ x).double()
    mean = total / rows
    directions: Tensor = torch.linalg.eigh(products / rows - torch.outer(mean, mean)).eigenvectors
    return directions.flip(1).float()


def _fvu_by_components(
    batches: Iterator[Tensor], directions: Float[Tensor, "d_in d_in"], mean: Float[Tensor, " d_in"]
) -> list[float]:
    """Compute the FVU of projections on the first 0, 1, ... d_in directions."""
    captured, total = torch.zeros_like(mean, dtype=torch.float64), 0.0
    for x in batches:
        centred = x - mean
        captured += (centred @ directions).double().square().sum(0)
        total += float(centred.double().square().sum())
    return [1.0, *(1 - captured.cumsum(0) / total).tolist()]
