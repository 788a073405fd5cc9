"""Latents that two dictionaries share, by firing frequency.

Two latents are partners if they are mutual nearest neighbors by decoder direction, and the cosines
of both decoder and encoder directions are above .7. Published numbers pair latents by the best
overall assignment (Paulo and Belrose 2025, arXiv:2501.16615). Mutual neighbors are slightly fewer,
but can be found among millions and never pair a latent twice. The share is measured on 4,096 alive
latents, evenly spaced in order of frequency, or on all if there are fewer.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from dist_sae.checkpoint.trained import Trained
from dist_sae.comparison.matched import decoder_directions, densities_of, use_newest
from dist_sae.config import Run
from dist_sae.dictionaries.metrics import DUPLICATE_SAMPLE, DUPLICATES_CHUNK_LATENTS
from dist_sae.errors import ConfigError, NoIndexError

PARTNER_COSINE = 0.7
TENTHS = 10
_Z = 1.96


class Overlap(NamedTuple):
    """Share of one dictionary's latents with a partner in another."""

    looked_at: int
    partners: int
    densities: tuple[float, ...]
    """Median density of each tenth of the latents looked at, the rarest first."""
    shares: tuple[float, ...]
    """Share of each tenth with a partner."""
    intervals: tuple[tuple[float, float], ...]
    """95 % interval of each share (Wilson 1927)."""
    recapture: float
    """Capture-recapture estimate of the number of features (Lincoln-Petersen): the product of both
    numbers of alive latents, over the number of partners. It is wrong here: see
    `dark_matter_findings.WRONG_RECAPTURE`."""

    @property
    def share(self) -> float:
        """Share of the latents looked at that have a partner."""
        return self.partners / self.looked_at


@torch.no_grad()
def find_overlap(one: Run, other: Run) -> Overlap:
    """Find the partners of one run's latents in another run's newest dictionary.

    The decoders and encoders are read part by part.

    Raises:
        ConfigError: The dictionaries cannot be compared, or a run has no checkpoint.
        NoIndexError: A run has no latent index of its newest checkpoint.
    """
    for run in (one, other):
        if not run.sae.has_latent_rows:
            raise ConfigError(f"{run.name}: latents of sae.kind {run.sae.kind} cannot be matched")
    if (one.reads, one.writes) != (other.reads, other.writes):
        raise ConfigError(
            f"{one.name} and {other.name}: read or write different sites; latents can be matched "
            f"only if both read and write the same"
        )
    densities = use_newest(one, _alive)
    alive = np.flatnonzero(densities)
    others_alive = int((use_newest(other, _alive) > 0).sum())
    if not len(alive) or not others_alive:
        raise ConfigError(f"{(one if not len(alive) else other).name}: no latent fires")
    ordered = alive[np.argsort(densities[alive], kind="stable")]
    chosen = ordered[np.linspace(0, len(alive) - 1, min(len(alive), DUPLICATE_SAMPLE)).astype(int)]
    latents = torch.from_numpy(chosen)
    rows = use_newest(one, lambda trained: _rows(decoder_directions(trained), latents))
    _, nearest, theirs = use_newest(other, lambda trained: _nearest(rows, trained))
    cosines = (rows * theirs).sum(1)
    _, back, _ = use_newest(one, lambda trained: _nearest(theirs, trained))
    encoders = use_newest(one, lambda trained: _rows(_encoder_directions(trained), latents))
    their_encoders = use_newest(other, lambda trained: _rows(_encoder_directions(trained), nearest))
    near = torch.minimum(cosines, (encoders * their_encoders).sum(1)) > PARTNER_COSINE
    found = (near & (back == latents)).numpy()
    return overlap_by_frequency(densities[chosen], found, len(alive), others_alive)


def overlap_by_frequency(
    densities: NDArray[np.float64], found: NDArray[np.bool_], alive: int, others_alive: int
) -> Overlap:
    """Count partners by frequency.

    Args:
        densities: Densities of the latents looked at, ascending.
        found: Whether each of them has a partner.
        alive: Number of alive latents of their dictionary.
        others_alive: Number of alive latents of the other dictionary.
    """
    tenths = [t for t in np.array_split(np.arange(len(found)), TENTHS) if len(t)]
    shares = [float(found[t].mean()) for t in tenths]
    partners = int(found.sum())
    common = alive * partners / len(found)
    return Overlap(
        len(found),
        partners,
        tuple(float(np.median(densities[t])) for t in tenths),
        tuple(shares),
        tuple(_wilson(share, len(t)) for share, t in zip(shares, tenths, strict=True)),
        alive * others_alive / common if common else math.inf,
    )


def _alive(trained: Trained) -> NDArray[np.float64]:
    densities: NDArray[np.float64] | None = densities_of(trained)
    if densities is None:
        run = trained.run
        raise NoIndexError(
            f"{run.store.runs}/{run.name}: has no latent index of step {trained.step} yet; "
            f"run `dist-sae index`"
        )
    return densities


def _encoder_directions(trained: Trained) -> Iterator[Float[Tensor, "some d_in"]]:
    """Yield parts of the encoder in the scale of the model, with rows of unit length."""
    normalisers = trained.normalisers
    scales = torch.cat(
        [
            torch.full((width,), normalisers.by_site[site].scale)
            for site, width in zip(normalisers.reads, normalisers.widths.reads, strict=True)
        ]
    )
    for part in trained.pages.parts("W_enc"):
        yield normalize(part * scales, dim=1)


def _rows(parts: Iterator[Tensor], latents: Tensor) -> Tensor:
    """Collect the rows of some latents, which may be in any order."""
    rows, first = torch.empty(0), 0
    for part in parts:
        if not len(rows):
            rows = torch.empty(len(latents), part.shape[1])
        here = (latents >= first) & (latents < first + len(part))
        rows[here] = part[latents[here] - first]
        first += len(part)
    return rows


def _nearest(rows: Tensor, trained: Trained) -> tuple[Tensor, Tensor, Tensor]:
    """Return cosine, number and direction of the nearest decoder row to each of `rows`."""
    best = torch.full((len(rows),), -2.0)
    which = torch.zeros(len(rows), dtype=torch.int64)
    directions, first = torch.zeros_like(rows), 0
    for part in decoder_directions(trained):
        for piece in torch.split(part, DUPLICATES_CHUNK_LATENTS):
            highest, place = (rows @ piece.T).max(1)
            better = highest > best
            best[better], which[better] = highest[better], place[better] + first
            directions[better] = piece[place[better]]
            first += len(piece)
    return best, which, directions


def _wilson(share: float, n: int) -> tuple[float, float]:
    middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    spread = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n * n)) / (1 + _Z**2 / n)
    return max(0.0, middle - spread), min(1.0, middle + spread)
