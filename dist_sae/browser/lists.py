"""Lists of latents, from what is kept of all of them in memory."""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import urlencode

import numpy as np
from numpy.typing import NDArray

from dist_sae.analysis.mapped import Map
from dist_sae.errors import ArgumentError
from dist_sae.index.query import Index
from dist_sae.index.search import TopTokens

SORTS = {  # key: what a reader sees
    "density": "density, falling",
    "rarity": "density, rising",
    "max": "largest activation",
    "effect": "largest effect on a logit",
    "norm": "length of the decoder row",
    "cluster": "cluster",
    "latent": "number",
}
PAGE_LATENTS = 50
"""Latents of a page of a list."""
_TOKENS = 5  # of a latent in a list
_COLUMNS = ["density", "max", "decoder_norm", "top_tokens", "top_logits"]


class Choice(NamedTuple):
    """Which latents a list shows, and in which order."""

    sort: str = "density"
    least: float = 0.0
    """Least density, in percent; latents that never fire are in no list."""
    most: float = 100.0
    """Largest density, in percent."""
    effect: float = 0.0
    """Least effect on a logit: the decoder's, times the largest activation."""
    cluster: str = ""
    """Level and number of a cluster of the map, as 0.12; empty: all latents."""
    page: int = 0

    @classmethod
    def of(cls, query: Mapping[str, str]) -> "Choice":
        """Read a choice from an address; raises `ArgumentError`."""
        sort = query.get("sort", "density")
        if sort not in SORTS:
            raise ArgumentError(f"sort: {sort}: is none of {', '.join(SORTS)}")
        least, effect = _real(query, "least", 0.0), _real(query, "effect", 0.0)
        most, cluster = _real(query, "most", 100.0), query.get("cluster", "")
        return cls(sort, least, most, effect, cluster, number(query, "page"))

    def query(self, page: int = 0) -> str:
        """Query string of this list at another page."""
        said = self._replace(page=page)._asdict()
        kept = {k: v for k, v in said.items() if k == "sort" or v != self._field_defaults[k]}
        return urlencode({k: f"{v:.12g}" if isinstance(v, float) else v for k, v in kept.items()})


class Lists:
    """All latents by their numbers, their tokens and their clusters, in memory.

    Takes 60 bytes of a latent, and 10 of each token that it fires on (`TopTokens`); a million
    latents take some seconds to read.

    Args:
        index: The index.
        map_: The map of its latents, if there is one.
        name: Gives the text of a token.
    """

    def __init__(self, index: Index, map_: Map | None, name: Callable[[int], str]) -> None:
        parts: dict[str, list[NDArray[Any]]] = {}
        for table in index.latents(_COLUMNS):
            found = {name: table[name].to_numpy() for name in _COLUMNS[:-2]}
            top = [table[name].combine_chunks().flatten().to_numpy() for name in _COLUMNS[-2:]]
            if len(top[0]):
                tokens, logits = (column.reshape(len(table), -1) for column in top)
                found |= {"effect": logits[:, 0] * found["max"], "raises": tokens[:, :_TOKENS]}
            for key, part in found.items():
                kind = np.int32 if key == "raises" else np.float32
                parts.setdefault(key, []).append(part.astype(kind))
        numbers = {key: np.concatenate(part) for key, part in parts.items()}
        self._raises = numbers.pop("raises", np.zeros((index.n_latents, 0), np.int32))
        self._numbers = numbers | {"norm": numbers.pop("decoder_norm")}
        self.map = map_
        """Clusters and places."""
        self._levels = map_.levels if map_ else []
        self._name = name
        self._order = lru_cache(maxsize=None)(self._find_order)
        self.tokens = TopTokens(index)
        """The tokens of the largest activations."""
        self.never = int((numbers["density"] == 0).sum())
        """Latents that never fire."""

    @property
    def sorts(self) -> dict[str, str]:
        """Orders that there are."""
        missing = {"effect"} - self._numbers.keys() | (set() if self._levels else {"cluster"})
        return {key: text for key, text in SORTS.items() if key not in missing}

    def row(self, latent: int) -> dict[str, Any]:
        """Numbers of a latent, its clusters, and tokens: that it fires on most, that it raises."""
        return {
            "latent": latent,
            **{name: float(column[latent]) for name, column in self._numbers.items()},
            "fires_on": list(map(self._name, self.tokens.of(latent, _TOKENS))),
            "raises": list(map(self._name, self._raises[latent].tolist())),
            "clusters": self.map.clusters_of(latent) if self.map else [],
        }

    def page(self, latents: NDArray[np.integer[Any]], page: int) -> dict[str, Any]:
        """The rows of a page of a list, and its place among the pages."""
        shown = latents[page * PAGE_LATENTS :][:PAGE_LATENTS].tolist()
        return {"latents": list(map(self.row, shown)), **numbered(len(latents), page, PAGE_LATENTS)}

    def turns(self, latent: int, choice: Choice) -> list[tuple[str, str, str]]:
        """Links from a latent of a list, to the list and its neighbours there.

        Returns:
            Relation, address and text of each; empty if the list has no such latent.
        """
        order = self.find(choice)
        at = np.flatnonzero(order == latent).tolist()
        turns = [("up", f"/?{choice.query(n // PAGE_LATENTS)}", "list") for n in at]
        for rel, n in (("prev", -1), ("next", 1)):
            near = [int(order[i + n]) for i in at if 0 <= i + n < len(order)]
            turns += [(rel, f"/latent/{to}?{choice.query()}", f"latent {to}") for to in near]
        return turns

    def find(self, choice: Choice) -> NDArray[np.int32]:
        """The latents of a list, in its order, on all pages.

        Raises:
            ArgumentError: The index or its map has no such order, or no such cluster.
        """
        if choice.sort not in self.sorts or (choice.effect and "effect" not in self._numbers):
            what = "cluster" if choice.sort == "cluster" else "effect"
            where = {"cluster": "there is no map", "effect": "the index has no output tokens"}
            raise ArgumentError(f"{what}: {where[what]}")
        order = self._order(choice.sort)
        density = self._numbers["density"]
        shown = (density > 0) & (density >= choice.least / 100) & (density <= choice.most / 100)
        if choice.effect:
            shown &= self._numbers["effect"] >= choice.effect
        if choice.cluster:
            shown &= self._in_cluster(choice.cluster)
        return order[shown[order]]

    def _find_order(self, sort: str) -> NDArray[np.int32]:
        numbers = self._numbers
        match sort:
            case "latent":
                return np.arange(len(numbers["density"]), dtype=np.int32)
            case "cluster":  # latents in none come last
                keys = [level.astype(np.uint32) for level in reversed(self._levels)]
                return np.lexsort((-numbers["density"], *keys)).astype(np.int32)
            case "rarity":
                key = numbers["density"]
            case _:
                key = -numbers[sort]
        return np.argsort(key, kind="stable").astype(np.int32)

    def _in_cluster(self, cluster: str) -> NDArray[np.bool_]:
        level, _, number = cluster.partition(".")
        found = np.zeros(0, np.bool_)
        if level.isdecimal() and number.isdecimal() and int(level) < len(self._levels):
            found = self._levels[int(level)] == int(number)
        if not found.any():
            raise ArgumentError(f"cluster: {cluster}: the map has no such cluster")
        return found


def numbered(found: int, page: int, of_page: int) -> dict[str, int]:
    """Number of what was found, of pages, and of this page; raises `ArgumentError`."""
    pages = max(1, -(-found // of_page))
    if page >= pages:
        raise ArgumentError(f"page: {page}: there are pages 0 to {pages - 1}")
    return {"found": found, "pages": pages, "page": page}


def number(query: Mapping[str, str], name: str, default: int = 0) -> int:
    """A number, from 0, that an address gives; raises `ArgumentError`."""
    said = query.get(name, str(default)).strip()
    if not said.isdecimal():
        raise ArgumentError(f"{name}: {said}: is not a number")
    return int(said)


def _real(query: Mapping[str, str], name: str, default: float) -> float:
    said = query.get(name, "").strip() or default
    try:
        found = float(said)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise ArgumentError(f"{name}: {said}: is not a number")
    return found
