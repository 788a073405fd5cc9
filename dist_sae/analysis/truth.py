"""Matching of latents with the known features of a synthetic world."""

from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

LEAST_COSINE = 0.9
"""Cosine above which a latent matches a feature."""


def match_features(
    features: Float[Tensor, "n_features d"], parts: Iterable[tuple[int, Float[Tensor, "n d"]]]
) -> dict[int, int]:
    """Pair features and latents one to one, the nearest first.

    Every latent is compared with every feature, a part of the decoder at a time. This is fast
    enough because worlds have few features. Pairs below `LEAST_COSINE` are dropped.

    Args:
        features: Unit directions.
        parts: First latent and unit directions of each part of the decoder.

    Returns:
        Latents by feature, for the features that have one.
    """
    found: list[NDArray[np.float64]] = []
    for first, rows in parts:
        cosines = rows @ features.T
        latent, feature = (cosines > LEAST_COSINE).nonzero(as_tuple=True)
        near = [latent + first, feature, cosines[latent, feature]]
        found.append(torch.stack([each.double() for each in near], 1).numpy())
    pairs = np.concatenate([np.zeros((0, 3)), *found])
    latent_of: dict[int, int] = {}
    taken: set[int] = set()
    for latent, feature in pairs[np.argsort(-pairs[:, 2], kind="stable"), :2].astype(int).tolist():
        if feature not in latent_of and latent not in taken:
            latent_of[feature] = latent
            taken.add(latent)
    return latent_of
