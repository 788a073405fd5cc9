"""The stored map of a dictionary, from `dist-sae analyse map`: positions and clusters."""

import logging
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from dist_sae.analysis.names import distinct
from dist_sae.index.query import Index
from dist_sae.report.outcome import Outcome, read_outcome, read_outcome_table
from dist_sae.storage import ObjectStore

logger = logging.getLogger(__name__)

_SIDE = 200  # of the small map
_DRAWN, _DRAWN_NEAR = 1500, 300  # latents on the small map: random ones, and of the same cluster
_TOKENS = 4  # most tokens in the name of a cluster


class Cluster(NamedTuple):
    """A cluster of latents."""

    key: str
    """Level and number of the cluster, such as 0.12, by which lists of latents select it."""
    name: str
    """Tokens that are more frequent among the cluster's latents than elsewhere."""
    size: int
    """Number of latents."""
    density: float
    """Sum of the densities of the cluster's latents."""
    stability: float | None
    """Mean Jaccard index with the best match in resamples; None if no resample has two of its
    latents."""


class Map:
    """Places and clusters of all latents.

    Args:
        store: The store of runs.
        run: Name of the run.
        outcome: Stored outcome of `dist-sae analyse map`.

    Raises:
        CorruptObjectError: A table is damaged.
    """

    def __init__(self, store: ObjectStore, run: str, outcome: Outcome) -> None:
        self._store, self._page = store, f"{run}/analysis/map/map.html"
        latents = read_outcome_table(store, outcome, "latents")

        def numbers(name: str) -> NDArray[np.int32]:
            found: NDArray[np.int32] = latents[name].fill_null(-1).to_numpy().astype(np.int32)
            return found

        self._levels = [numbers(n) for n in latents.column_names if n.startswith("cluster_")]
        self._parent = numbers("parent")
        xy = np.stack([latents[name].to_numpy() for name in ("x", "y")], 1)
        span = max(float(np.ptp(xy, axis=0).max()), 1e-9)
        self._places = np.round((xy - xy.min(0)) / span * _SIDE).astype(np.int32)
        self._clusters: list[list[Cluster]] = [[] for _ in self._levels]
        for line in read_outcome_table(store, outcome, "clusters").to_pylist():
            self._clusters[line["level"]].append(_cluster(line))

    @property
    def levels(self) -> list[NDArray[np.int32]]:
        """Cluster of each latent, by level from coarse to fine; -1 if it is in none."""
        return self._levels

    @property
    def clusters(self) -> list[list[Cluster]]:
        """The clusters of each level, the largest first."""
        return self._clusters

    def clusters_of(self, latent: int) -> list[Cluster]:
        """Return the clusters that a latent is in, from coarse to fine."""
        pairs = zip(self._levels, self._clusters, strict=True)
        return [clusters[of[latent]] for of, clusters in pairs if of[latent] >= 0]

    def parent(self, latent: int) -> int | None:
        """Return the parent, which fires on at least 90 % of the latent's rows, if there is one."""
        parent = int(self._parent[latent])
        return parent if parent >= 0 else None

    def page(self) -> str:
        """Read the HTML page of the whole map. A latent's number as URL fragment selects it.

        Raises:
            ObjectNotFoundError: The page is gone.
        """
        return self._store.get(self._page).decode()

    def small(self, latent: int) -> Markup:
        """Draw a small map with a latent and the finest cluster that it is in, as SVG."""
        near = np.zeros(0, np.int64)
        for of in self._levels:
            near = np.flatnonzero(of == of[latent]) if of[latent] >= 0 else near
        drawn = _path(self._places[near[:: max(1, len(near) // _DRAWN_NEAR)]])
        x, y = self._places[latent].tolist()
        return Markup(
            f'<svg class="small-map" viewBox="-6 -6 {_SIDE + 12} {_SIDE + 12}" aria-hidden="true">'
            f'<path d="{self._background}"/><path class="near" d="{drawn}"/>'
            f'<circle cx="{x}" cy="{y}" r="5"/></svg>'
        )

    @cached_property
    def _background(self) -> str:
        chosen = np.random.default_rng(0).permutation(len(self._places))[:_DRAWN]
        return _path(np.unique(self._places[chosen], axis=0))


def open_map(store: ObjectStore, index: Index, run: str) -> Map | None:
    """Open a run's map if it is of the index's checkpoint. Otherwise log that and return None.

    Raises:
        CorruptObjectError: The map is damaged.
    """
    outcome = read_outcome(store, run, "map")
    if outcome is None:
        logger.info("no map and no clusters: `dist-sae analyse map` computes them")
    elif outcome.checkpoints.get(run) != index.manifest.checkpoint:
        logger.warning(
            "no map and no clusters: they were computed from another checkpoint; "
            "run `dist-sae analyse map`"
        )
    else:
        return Map(store, run, outcome)
    return None


def _cluster(line: dict[str, Any]) -> Cluster:
    name = ", ".join(distinct(line["tokens"])[:_TOKENS])
    numbers = (line[key] for key in ("size", "density", "stability"))
    return Cluster(f"{line['level']}.{line['cluster']}", name or "no name", *numbers)


def _path(places: NDArray[np.int32]) -> str:
    """Return an SVG path of points: zero-length segments, which round line caps make visible."""
    return "".join(f"M{x} {y}h0" for x, y in places.tolist())
