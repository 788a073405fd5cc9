"""Lists of latents, from numbers of all latents in memory."""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import urlencode

import numpy as np
from numpy.typing import NDArray

from dist_sae.analysis.stored_map import Map
from dist_sae.errors import ArgumentError
from dist_sae.index.query import Index
from dist_sae.index.search import TopTokens

SORTS = {  # key: label on the page
    "density": "density, descending",
    "rarity": "density, ascending",
    "max": "largest activation",
    "effect": "largest effect on a logit",
    "norm": "length of the decoder row",
    "cluster": "cluster",
    "latent": "number",
}
PAGE_LATENTS = 50
"""Latents per page of a list."""
_TOKENS = 5  # tokens per latent in a list
_COLUMNS = ["density", "max", "decoder_norm", "top_tokens", "top_logits"]


class ListQuery(NamedTuple):
    """The filter, order and page of a list of latents."""

    sort: str = "density"
    least: float = 0.0
    """Lowest density to show, in percent. Latents that never fire are not in any list."""
    most: float = 100.0
    """Highest density to show, in percent."""
    effect: float = 0.0
    """Smallest effect on a logit to show: the decoder row's effect times the largest activation."""
    cluster: str = ""
    """Level and number of a cluster of the map, for example 0.12; empty for all latents."""
    page: int = 0

    @classmethod
    def of(cls, query: Mapping[str, str]) -> "ListQuery":
        """Parse a query string. Raises `ArgumentError` for an invalid value."""
        sort = query.get("sort", "density")
        if sort not in SORTS:
            raise ArgumentError(f"sort: {sort}: must be one of {', '.join(SORTS)}")
        least, effect = _read_float(query, "least", 0.0), _read_float(query, "effect", 0.0)
        most, cluster = _read_float(query, "most", 100.0), query.get("cluster", "")
        return cls(sort, least, most, effect, cluster, read_number(query, "page"))

    def encode(self, page: int = 0) -> str:
        """Return the query string of another page of this list."""
        values = self._replace(page=page)._asdict()
        kept = {k: v for k, v in values.items() if k == "sort" or v != self._field_defaults[k]}
        return urlencode({k: f"{v:.12g}" if isinstance(v, float) else v for k, v in kept.items()})


class LatentLists:
    """Numbers, tokens and clusters of all latents, in memory.

    Takes 60 bytes per latent, and 10 per distinct token that the latent fires on (`TopTokens`). A
    million latents take some seconds to read.

    Args:
        index: The index.
        map_: The map of its latents, if there is one.
        name: Function that returns the text of a token.
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
        """The map, which has the clusters and places of the latents."""
        self._levels = map_.levels if map_ else []
        self._name = name
        self._order = lru_cache(maxsize=None)(self._find_order)
        self.tokens = TopTokens(index)
        """The tokens of the largest activations."""
        self.never = int((numbers["density"] == 0).sum())
        """Number of latents that never fire."""

    @property
    def sorts(self) -> dict[str, str]:
        """The available orders, from key to label."""
        missing = {"effect"} - self._numbers.keys() | (set() if self._levels else {"cluster"})
        return {key: text for key, text in SORTS.items() if key not in missing}

    def row(self, latent: int) -> dict[str, Any]:
        """Return a latent's numbers, clusters, and the tokens that it fires on and raises most."""
        return {
            "latent": latent,
            **{name: float(column[latent]) for name, column in self._numbers.items()},
            "fires_on": list(map(self._name, self.tokens.of(latent, _TOKENS))),
            "raises": list(map(self._name, self._raises[latent].tolist())),
            "clusters": self.map.clusters_of(latent) if self.map else [],
        }

    def page(self, latents: NDArray[np.integer[Any]], page: int) -> dict[str, Any]:
        """Return the rows of a page of a list, with the number of pages."""
        shown = latents[page * PAGE_LATENTS :][:PAGE_LATENTS].tolist()
        return {
            "latents": list(map(self.row, shown)),
            **page_numbers(len(latents), page, PAGE_LATENTS),
        }

    def navigation_links(self, latent: int, query: ListQuery) -> list[tuple[str, str, str]]:
        """Return links from a latent to its list, and to the previous and next latent of the list.

        Returns:
            Relation, URL and text of each link; empty if the latent is not in the list.
        """
        order = self.find(query)
        at = np.flatnonzero(order == latent).tolist()
        links = [("up", f"/?{query.encode(n // PAGE_LATENTS)}", "list") for n in at]
        for rel, n in (("prev", -1), ("next", 1)):
            near = [int(order[i + n]) for i in at if 0 <= i + n < len(order)]
            links += [(rel, f"/latent/{to}?{query.encode()}", f"latent {to}") for to in near]
        return links

    def find(self, query: ListQuery) -> NDArray[np.int32]:
        """Find the latents on all pages of a list, in its order.

        Raises:
            ArgumentError: The index has no map or no effects for this query, or no such cluster.
        """
        if query.sort not in self.sorts or (query.effect and "effect" not in self._numbers):
            what = "cluster" if query.sort == "cluster" else "effect"
            where = {"cluster": "there is no map", "effect": "the index has no output tokens"}
            raise ArgumentError(f"{what}: {where[what]}")
        order = self._order(query.sort)
        density = self._numbers["density"]
        shown = (density > 0) & (density >= query.least / 100) & (density <= query.most / 100)
        if query.effect:
            shown &= self._numbers["effect"] >= query.effect
        if query.cluster:
            shown &= self._in_cluster(query.cluster)
        return order[shown[order]]

    def _find_order(self, sort: str) -> NDArray[np.int32]:
        numbers = self._numbers
        match sort:
            case "latent":
                return np.arange(len(numbers["density"]), dtype=np.int32)
            case "cluster":  # latents in no cluster come last
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


def page_numbers(found: int, page: int, of_page: int) -> dict[str, int]:
    """Return the number of results, of pages, and of this page.

    Raises:
        ArgumentError: There is no such page.
    """
    pages = max(1, -(-found // of_page))
    if page >= pages:
        raise ArgumentError(f"page: {page}: there are pages 0 to {pages - 1}")
    return {"found": found, "pages": pages, "page": page}


def read_number(query: Mapping[str, str], name: str, default: int = 0) -> int:
    """Read a non-negative integer from a query string. Raises `ArgumentError` for other values."""
    said = query.get(name, str(default)).strip()
    if not said.isdecimal():
        raise ArgumentError(f"{name}: {said}: must be a whole number from 0")
    return int(said)


def _read_float(query: Mapping[str, str], name: str, default: float) -> float:
    said = query.get(name, "").strip() or default
    try:
        found = float(said)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise ArgumentError(f"{name}: {said}: is not a number")
    return found
