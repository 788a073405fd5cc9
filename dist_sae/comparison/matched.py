"""Latents that two dictionaries have in common: near copies, by firing frequency.

A latent has a near copy in another dictionary if the cosine of its decoder row with some row there
is above .9, as in `duplicate_share`. Rows are compared in the scale of the model, because each run
measures its own constant scales of sites. The share is measured on 4,096 latents, evenly spaced in
order of frequency, or on all if there are fewer.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from dist_sae.checkpoint.trained import Trained, no_checkpoint_error, use_trained
from dist_sae.config import Run
from dist_sae.dictionaries.metrics import (
    DUPLICATE_COSINE,
    DUPLICATE_SAMPLE,
    DUPLICATES_CHUNK_LATENTS,
)
from dist_sae.dictionaries.normaliser import SiteNormalisers
from dist_sae.errors import ConfigError, NoIndexError
from dist_sae.index.query import index_of
from dist_sae.storage import open_store

Result = TypeVar("Result")


class MatchedLatents(NamedTuple):
    """Share of a dictionary's latents that have a near copy in another."""

    share: float
    by_decade: dict[int, float]
    """Shares of latents with a near copy, by decade of density. Decade d is densities from 10^d to
    10^(d+1). Empty if the first run has no latent index."""


class _Chosen(NamedTuple):
    rows: Float[Tensor, "chosen d_out"]
    """Decoder rows, scaled to unit length."""
    densities: Float[NDArray[np.float64], " chosen"] | None


@torch.no_grad()
def match_latents(one: Run, other: Run) -> MatchedLatents:
    """Find near copies of one run's latents in another run, in their newest dictionaries.

    Raises:
        ConfigError: The dictionaries cannot be compared, or a run has no checkpoint.
        PlanMismatchError: A run file differs from the run that was trained with it.
        CorruptObjectError: A checkpoint, or the index of the first run, is damaged.
    """
    check_matchable(one, other)
    chosen = use_newest(one, _choose)
    copied = (
        use_newest(other, lambda trained: _nearest(chosen.rows, trained)) > DUPLICATE_COSINE
    ).numpy()
    by_decade = {}
    if chosen.densities is not None:
        fires = chosen.densities > 0
        decades = np.floor(np.log10(chosen.densities[fires])).astype(int)
        by_decade = {int(d): float(copied[fires][decades == d].mean()) for d in np.unique(decades)}
    return MatchedLatents(float(copied.mean()), by_decade)


def check_matchable(one: Run, other: Run) -> None:
    """Check that latents of two runs can be matched.

    Raises:
        ConfigError: The latents cannot be matched.
    """
    for run in (one, other):
        if not run.sae.has_latent_rows:
            raise ConfigError(f"{run.name}: latents of sae.kind {run.sae.kind} cannot be matched")
    if one.writes != other.writes:
        sites = " and ".join(f"{run.name} writes {', '.join(run.writes)}" for run in (one, other))
        raise ConfigError(f"{sites}: latents can be matched only if both write the same sites")


def use_newest(run: Run, use: Callable[[Trained], Result]) -> Result:
    """Call `use` with a run's newest dictionary; see `use_trained`.

    Raises:
        ConfigError: The run has no checkpoint.
    """
    store = open_store(run.store.runs, run.store.s3)
    found = use_trained(store, run, None, use, memory_bytes=run.evaluate.memory_bytes)
    if found is None:
        raise no_checkpoint_error(store, run)
    return found


def _choose(trained: Trained) -> _Chosen:
    densities = densities_of(trained)
    n = trained.pages.n_latents
    order = np.arange(n) if densities is None else np.argsort(densities, kind="stable")
    places = np.linspace(0, n - 1, min(n, DUPLICATE_SAMPLE)).astype(int)
    latents = np.sort(order[places])
    parts, first = [], 0
    for rows in decoder_directions(trained):
        here = latents[(latents >= first) & (latents < first + len(rows))]
        parts.append(rows[torch.from_numpy(here - first)])
        first += len(rows)
    return _Chosen(torch.cat(parts), None if densities is None else densities[latents])


def _nearest(rows: Tensor, trained: Trained) -> Float[Tensor, " chosen"]:
    """Return the highest cosine of each row with any decoder row of a dictionary."""
    cosines = torch.full((len(rows),), -1.0)
    for part in decoder_directions(trained):
        for piece in torch.split(part, DUPLICATES_CHUNK_LATENTS):
            torch.maximum(cosines, (rows @ piece.T).amax(1), out=cosines)
    return cosines


def decoder_directions(trained: Trained) -> Iterator[Float[Tensor, "some d_out"]]:
    """Yield parts of the decoder in the scale of the model, with rows of unit length."""
    scales = scales_of_targets(trained.normalisers)
    for part in trained.pages.parts("W_dec"):
        yield normalize(part / scales, dim=1)


def scales_of_targets(normalisers: SiteNormalisers) -> Float[Tensor, " d_out"]:
    """Return the scale of each column of the targets, by which decoder rows are divided."""
    scales = torch.empty(normalisers.widths.d_out)
    for site, columns in normalisers.columns.items():
        scales[columns] = normalisers.by_site[site].scale
    return scales


def densities_of(trained: Trained) -> Float[NDArray[np.float64], " n_latents"] | None:
    """Read each latent's density, the share of rows it fires on; None if there is no index."""
    run = trained.run
    try:
        index = index_of(open_store(run.store.runs, run.store.s3), run.name, trained.checkpoint)
    except NoIndexError:
        return None
    return np.concatenate([part["density"].to_numpy() for part in index.latents(["density"])])
