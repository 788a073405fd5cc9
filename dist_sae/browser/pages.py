"""Pages of the browser, from the index of a run."""

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import urlencode

from dist_sae.analysis.mapped import open_map
from dist_sae.browser.lists import PAGE_LATENTS, Choice, Lists, number, numbered
from dist_sae.browser.reading import TOP, Reading
from dist_sae.comparison.nearest import Other
from dist_sae.errors import ArgumentError, DistSaeError
from dist_sae.index.search import Matches, has_pattern, is_token
from dist_sae.notebook.run import OpenedRun
from dist_sae.report.latents import LatentView
from dist_sae.report.page import render_template
from dist_sae.report.terminal import Explorer, Style
from dist_sae.storage import open_store

MAP_NAME = "map.html"
"""Name of the file with the map."""
_PAGE_CLUSTERS = 100
_NEAREST = 5  # latents of another run
_OF_DECILE = 2  # examples
_KEPT_ANSWERS = 16  # of each kind
_KINDS = {
    "latent": "latent number",
    "token": "token",
    "regex": "tokens by regular expression",
    "text": "text: what fires on it",
}


class Pages:
    """Pages of a run's latent index; may be asked by several threads.

    Args:
        run: The run.
        index: Name of the index; None takes the complete one of the last step.
        chosen: The latents that there are pages of, if these are files: they link to one another,
            and nothing can be searched.
        other: Another run, to compare latents with, by its index of the last step.

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
        self._other: Other | None = None
        if other is not None:
            self._other = Other(run.config, self._explorer.index, other.config)
        self._chosen = frozenset(chosen)
        self._names: dict[int, str] = {}
        self._turn = threading.RLock()  # texts, the model and its dictionary are read by one thread
        self._first = threading.Lock()
        self._kept: Lists | None = None
        self._matches = lru_cache(_KEPT_ANSWERS)(self._find_matches)
        self._reading = lru_cache(_KEPT_ANSWERS)(self._read)

    @property
    def place(self) -> str:
        """Path or URL of the index."""
        return self._explorer.index.place

    def prepare(self) -> None:
        """Read what is kept of all latents; pages wait for it."""
        with contextlib.suppress(DistSaeError):  # the first page meets it as well, and says it
            for token in self._lists.tokens.tokens.tolist():
                self._name(token)

    def listed(self, choice: Choice) -> str:
        """A list of latents."""
        lists = self._lists
        found = lists.find(choice)
        level, _, of_level = choice.cluster.partition(".")
        return self._render(
            "list",
            "latents",
            **lists.page(found, choice.page),
            href=lambda latent: f"/latent/{latent}?{choice.query()}",
            at=lambda page: f"/?{choice.query(page)}",
            choice=choice,
            cluster=lists.map.clusters[int(level)][int(of_level)] if lists.map and level else None,
            has_map=self.has_map,
            never=lists.never,
            sorts=lists.sorts,
        )

    def chosen(self, latents: Sequence[int]) -> str:
        """A list of chosen latents."""
        return self._render("chosen", "latents", latents=list(map(self._lists.row, latents)))

    def clusters(self, query: Mapping[str, str]) -> str:
        """The clusters of the map at a `level`."""
        map_ = self._lists.map
        if map_ is None:
            raise ArgumentError("clusters: there is no map; run `dist-sae analyse map`")
        level, page = number(query, "level"), number(query, "page")
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
            **numbered(len(found), page, _PAGE_CLUSTERS),
        )

    @property
    def has_map(self) -> bool:
        """Whether there is a map of the latents."""
        return self._lists.map is not None

    def map(self) -> str:
        """The map of all latents."""
        if self._lists.map is None:
            raise ArgumentError("map: there is none; run `dist-sae analyse map`")
        return self._lists.map.page()

    def latent(self, latent: int, choice: Choice | None = None) -> str:
        """A latent's page; raises `LatentNotFoundError`.

        Args:
            latent: Its number.
            choice: The list that it was found in, whose next latent it leads to.
        """
        view = self._view(self._explorer, latent)
        turns = (choice and self._lists.turns(latent, choice)) or self._turns(latent)
        return self._render("latent", f"latent {latent}", **self._around(view), turns=turns)

    def compare(self, latent: int, other: int | None) -> str:
        """A latent beside one of the other run, by default the nearest.

        Raises:
            ArgumentError: There is no other run.
            LatentNotFoundError: There is no such latent.
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
            **self._around(view),
            theirs=self._view(self._other.explorer, chosen),
            candidates=nearest,
            beside=lambda near: "" if self._chosen else f"{here}{near}",
            shared=self._other.shared(latent, chosen),
        )

    def search(self, query: Mapping[str, str]) -> str:
        """Search; returns the page of what is found.

        Args:
            query: `kind`, and what is `asked`; then the `page`, or in a text the `latent` to show.

        Raises:
            LatentNotFoundError: There is no latent of this number.
            ArgumentError: The question is none of its kind.
            ModelError: The model, or its tokenizer, is not at hand.
        """
        # forms send line ends in this way
        said = {
            "kind": query.get("kind", ""),
            "asked": query.get("asked", "").replace("\r\n", "\n"),
        }
        kind, asked = said.values()
        if kind not in _KINDS:
            raise ArgumentError(f"kind: {kind}: is none of {', '.join(_KINDS)}")
        if kind == "latent":
            return self.latent(number({"latent": asked}, "latent"))
        place = f"/search?{urlencode(said)}"
        if kind == "text":
            reading = self._reading(asked)
            shown = number(query, "latent", reading.strongest[0].latent if reading.strongest else 0)
            latents = [self._lists.row(each.latent) for each in reading.strongest]
            found = {"reading": reading, "shown": shown, "latents": latents, "place": place}
            tokens = self._run.config.activations.context_tokens
            return self._render("text", "text", **said, **found, context_tokens=tokens)
        matches, page = self._matches(kind, asked), number(query, "page")
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
        """A page that says what went wrong."""
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
    def _lists(self) -> Lists:
        with self._first:
            if self._kept is None:
                index, config = self._explorer.index, self._run.config
                runs = open_store(config.store.runs, config.store.s3)
                self._kept = Lists(index, open_map(runs, index, config.name), self._name)
            return self._kept

    def _name(self, token: int) -> str:
        """Text of a token."""
        if token not in self._names:
            with self._turn:
                self._names[token] = self._explorer.token(token)
        return self._names[token]

    def _view(self, explorer: Explorer, latent: int) -> LatentView:
        with self._turn:
            (view,) = explorer.view([latent], _OF_DECILE)
        return view

    def _around(self, view: LatentView) -> dict[str, Any]:
        """A latent's page, with the tokens of its neighbours and its place on the map."""
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

    def _turns(self, latent: int) -> list[tuple[str, str, str]]:
        """Links to the latents before and after: relation, address, text."""
        n = self._explorer.index.n_latents
        there = [("prev", latent - 1), ("next", latent + 1)]
        turns = [(rel, self._href(to), f"latent {to}") for rel, to in there if 0 <= to < n]
        return [turn for turn in turns if turn[1]]

    def _find_matches(self, kind: str, asked: str) -> Matches:
        tokens = self._lists.tokens
        with self._turn:
            texts = self._explorer.texts
            by_token = is_token(texts.tokenizer, asked) if kind == "token" else None
        return tokens.search(by_token or has_pattern(self._name, asked))

    def _is_token(self, text: str) -> bool:
        with self._turn:
            return len(self._explorer.texts.tokenizer([text])[0]) == 1

    def _read(self, asked: str) -> Reading:
        with self._turn:
            index = self._explorer.index
            return Reading(self._run.active_on(asked, index.n_latents, index.manifest.step))


def file_name(latent: int) -> str:
    """Name of the file with a latent's page."""
    return f"latent-{latent}.html"


def compare_name(latent: int) -> str:
    """Name of the file with a latent beside the nearest of another run."""
    return f"compare-{latent}.html"
