"""The browser's pages, rendered from a run's index."""

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import urlencode

from dist_sae.analysis.stored_map import open_map
from dist_sae.browser.lists import PAGE_LATENTS, LatentLists, ListQuery, page_numbers, read_number
from dist_sae.browser.text_latents import TOP, TextLatents
from dist_sae.comparison.nearest import OtherRun
from dist_sae.errors import ArgumentError, DistSaeError
from dist_sae.index.search import Matches, regex_test, token_test
from dist_sae.notebook.run import OpenedRun
from dist_sae.report.latents import LatentView
from dist_sae.report.page import render_template
from dist_sae.report.terminal import Explorer, Style
from dist_sae.storage import open_store

MAP_NAME = "map.html"
"""Name of the file with the map."""
_PAGE_CLUSTERS = 100
_NEAREST = 5  # nearest latents of the other run
_OF_DECILE = 2  # examples per decile
_KEPT_ANSWERS = 16  # cached results of each kind of search
_KINDS = {
    "latent": "latent number",
    "token": "token",
    "regex": "tokens by regular expression",
    "text": "text: latents that fire on it",
}


class Pages:
    """The pages of a run's latent index. Threads may share one instance.

    Args:
        run: The run.
        index: Name of the index; None takes the complete index of the latest step.
        chosen: The latents that have pages, if pages are written as files. Such pages only link to
            each other, and have no search.
        other: Another run to compare latents with, by its index of the latest step.

    Raises:
        NoIndexError: There is no complete index.
        ConfigError: The other run cannot be compared.
    """

    def __init__(
        self,
        run: OpenedRun,
        index: str | None,
        chosen: Sequence[int] = (),
        other: OpenedRun | None = None,
    ) -> None:
        self._run = run
        self._explorer = Explorer(run.config, index, Style())
        self._other: OtherRun | None = None
        if other is not None:
            self._other = OtherRun(run.config, self._explorer.index, other.config)
        self._chosen = frozenset(chosen)
        self._names: dict[int, str] = {}
        # guards the texts, the model and its dictionary, which only one thread may use at a time
        self._model_lock = threading.RLock()
        self._lists_lock = threading.Lock()
        self._cached_lists: LatentLists | None = None
        self._matches = lru_cache(_KEPT_ANSWERS)(self._find_matches)
        self._reading = lru_cache(_KEPT_ANSWERS)(self._read)

    @property
    def place(self) -> str:
        """Path or URL of the index."""
        return self._explorer.index.place

    def prepare(self) -> None:
        """Load the lists of all latents and the texts of their tokens. Pages wait for the lists."""
        with contextlib.suppress(DistSaeError):  # the first page meets the same error and shows it
            for token in self._lists.tokens.tokens.tolist():
                self._name(token)

    def listed(self, query: ListQuery) -> str:
        """Render a list of latents."""
        lists = self._lists
        found = lists.find(query)
        level, _, of_level = query.cluster.partition(".")
        return self._render(
            "list",
            "latents",
            **lists.page(found, query.page),
            href=lambda latent: f"/latent/{latent}?{query.encode()}",
            at=lambda page: f"/?{query.encode(page)}",
            query=query,
            cluster=lists.map.clusters[int(level)][int(of_level)] if lists.map and level else None,
            has_map=self.has_map,
            never=lists.never,
            sorts=lists.sorts,
        )

    def chosen(self, latents: Sequence[int]) -> str:
        """Render a list of the chosen latents."""
        return self._render("chosen", "latents", latents=list(map(self._lists.row, latents)))

    def clusters(self, query: Mapping[str, str]) -> str:
        """Render the list of the map's clusters at the `level` of the query."""
        map_ = self._lists.map
        if map_ is None:
            raise ArgumentError("clusters: there is no map yet; run `dist-sae analyse map`")
        level, page = read_number(query, "level"), read_number(query, "page")
        if level >= len(map_.clusters):
            raise ArgumentError(f"level: {level}: there are levels 0 to {len(map_.clusters) - 1}")
        found = map_.clusters[level]
        return self._render(
            "clusters",
            "clusters",
            clusters=found[page * _PAGE_CLUSTERS :][:_PAGE_CLUSTERS],
            counts=list(map(len, map_.clusters)),
            level=level,
            at=lambda other: f"/clusters?level={level}&page={other}",
            **page_numbers(len(found), page, _PAGE_CLUSTERS),
        )

    @property
    def has_map(self) -> bool:
        """Whether the latents have a map."""
        return self._lists.map is not None

    def map(self) -> str:
        """Return the page with the map of all latents."""
        if self._lists.map is None:
            raise ArgumentError("map: there is no map yet; run `dist-sae analyse map`")
        return self._lists.map.page()

    def latent(self, latent: int, query: ListQuery | None = None) -> str:
        """Render a latent's page.

        Args:
            latent: Number of the latent.
            query: The list that the latent was found in. The page links to the list's next latent.

        Raises:
            LatentNotFoundError: The dictionary has no such latent.
        """
        view = self._view(self._explorer, latent)
        links = (query and self._lists.navigation_links(latent, query)) or self._neighbor_links(
            latent
        )
        return self._render("latent", f"latent {latent}", **self._related(view), links=links)

    def compare(self, latent: int, other: int | None) -> str:
        """Render a latent next to a latent of the other run, by default the nearest.

        Raises:
            ArgumentError: There is no other run.
            LatentNotFoundError: One of the dictionaries has no such latent.
        """
        if self._other is None:
            raise ArgumentError("compare: start `dist-sae browse` with --compare RUN")
        view = self._view(self._explorer, latent)
        nearest = self._other.nearest(latent, _NEAREST)
        chosen = nearest[0][0].latent if other is None else other
        here = f"/compare?latent={latent}&other="
        return self._render(
            "compare",
            f"latent {latent} and {chosen} of {self._other.name}",
            **self._related(view),
            theirs=self._view(self._other.explorer, chosen),
            candidates=nearest,
            beside=lambda near: "" if self._chosen else f"{here}{near}",
            shared=self._other.common_rows(latent, chosen),
        )

    def search(self, query: Mapping[str, str]) -> str:
        """Search, and render the results.

        Args:
            query: The `kind` of search and the search text (`asked`). Then the `page` of the
                results or, for a pasted text, the `latent` to highlight.

        Raises:
            LatentNotFoundError: The dictionary has no latent of this number.
            ArgumentError: The kind is unknown, or the search text is not valid for it.
            ModelError: The model or its tokenizer cannot be loaded.
        """
        # HTML forms send line breaks as \r\n
        said = {
            "kind": query.get("kind", ""),
            "asked": query.get("asked", "").replace("\r\n", "\n"),
        }
        kind, asked = said.values()
        if kind not in _KINDS:
            raise ArgumentError(f"kind: {kind}: must be one of {', '.join(_KINDS)}")
        if kind == "latent":
            return self.latent(read_number({"latent": asked}, "latent"))
        place = f"/search?{urlencode(said)}"
        if kind == "text":
            reading = self._reading(asked)
            shown = read_number(
                query, "latent", reading.strongest[0].latent if reading.strongest else 0
            )
            latents = [self._lists.row(each.latent) for each in reading.strongest]
            found = {"reading": reading, "shown": shown, "latents": latents, "place": place}
            tokens = self._run.config.activations.context_tokens
            return self._render("text", "text", **said, **found, context_tokens=tokens)
        matches, page = self._matches(kind, asked), read_number(query, "page")
        paged = self._lists.page(matches.latents, page)
        for row, i in zip(paged["latents"], range(page * PAGE_LATENTS, 2**62), strict=False):
            row["hits"] = f"{matches.hits[i]} of {matches.examples[i]}"
        spaced = f" {asked}"
        return self._render(
            "matches",
            asked,
            **said,
            **paged,
            at=lambda other: f"{place}&page={other}",
            spaced=spaced if kind == "token" and self._is_token(spaced) else "",
        )

    def error(self, message: str) -> str:
        """Render a page with an error message."""
        return self._render("error", "error", message=message)

    def _render(self, what: str, title: str, **content: Any) -> str:
        content = {"kind": "latent", "asked": "", "href": self._href, **content}
        return render_template(
            "browse.html",
            what=what,
            title=title,
            run=self._run.config.name,
            n_latents=self._explorer.index.n_latents,
            kinds=_KINDS,
            home="index.html" if self._chosen else "/",
            is_live=not self._chosen,
            other=self._other.name if self._other else "",
            compare_place=compare_name if self._chosen else "/compare?latent={}".format,
            map_place=MAP_NAME if self._chosen else "/map",
            n_shown=TOP,
            **content,
        )

    @property
    def _href(self) -> Callable[[int], str]:
        if not self._chosen:
            return lambda latent: f"/latent/{latent}"
        return lambda latent: file_name(latent) if latent in self._chosen else ""

    @property
    def _lists(self) -> LatentLists:
        with self._lists_lock:
            if self._cached_lists is None:
                index, config = self._explorer.index, self._run.config
                runs = open_store(config.store.runs, config.store.s3)
                self._cached_lists = LatentLists(
                    index, open_map(runs, index, config.name), self._name
                )
            return self._cached_lists

    def _name(self, token: int) -> str:
        """Return the text of a token."""
        if token not in self._names:
            with self._model_lock:
                self._names[token] = self._explorer.token(token)
        return self._names[token]

    def _view(self, explorer: Explorer, latent: int) -> LatentView:
        with self._model_lock:
            (view,) = explorer.view([latent], _OF_DECILE)
        return view

    def _related(self, view: LatentView) -> dict[str, Any]:
        """Return a latent's view, with the tokens of related latents and its place on the map."""
        latent, lists = view.page.latent, self._lists
        near = {other.latent for other in view.page.nearest}
        near |= {other.latent for other in view.page.coactive}
        return {
            "view": view,
            "words_of": {other: lists.row(other)["fires_on"][:3] for other in near},
            "clusters": lists.row(latent)["clusters"],
            "parent": lists.map.parent(latent) if lists.map else None,
            "small": lists.map.small(latent) if lists.map else "",
        }

    def _neighbor_links(self, latent: int) -> list[tuple[str, str, str]]:
        """Return links to the latents before and after one, as (relation, URL, text)."""
        n = self._explorer.index.n_latents
        there = [("prev", latent - 1), ("next", latent + 1)]
        links = [(rel, self._href(to), f"latent {to}") for rel, to in there if 0 <= to < n]
        return [link for link in links if link[1]]

    def _find_matches(self, kind: str, asked: str) -> Matches:
        tokens = self._lists.tokens
        with self._model_lock:
            texts = self._explorer.texts
            by_token = token_test(texts.tokenizer, asked) if kind == "token" else None
        return tokens.search(by_token or regex_test(self._name, asked))

    def _is_token(self, text: str) -> bool:
        with self._model_lock:
            return len(self._explorer.texts.tokenizer([text])[0]) == 1

    def _read(self, asked: str) -> TextLatents:
        with self._model_lock:
            index = self._explorer.index
            return TextLatents(self._run.active_on(asked, index.n_latents, index.manifest.step))


def file_name(latent: int) -> str:
    """Return the name of the file with a latent's page."""
    return f"latent-{latent}.html"


def compare_name(latent: int) -> str:
    """Return the name of the file that compares a latent with another run's nearest latent."""
    return f"compare-{latent}.html"
