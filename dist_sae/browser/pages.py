"""Pages of the browser, from the index of a run."""

import threading
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple
from urllib.parse import urlencode

import numpy as np
from numpy.typing import NDArray

from dist_sae.errors import ArgumentError
from dist_sae.notebook.run import OpenedRun
from dist_sae.report.page import render_template
from dist_sae.report.terminal import Explorer, Style

PAGE_LATENTS = 50
"""Latents of a page of the list."""
_TOP = 8  # latents of a token
_KEPT_ORDERS = 16  # sorting a million latents takes a tenth of a second
_SORTS = {  # key: what a reader sees
    "density": "density, falling",
    "rarity": "density, rising",
    "max": "largest activation",
    "effect": "largest effect on a logit",
    "norm": "length of the decoder row",
    "latent": "number",
}
_KINDS = {
    "latent": "latent number",
    "token": "token",
    "regex": "tokens by regular expression",
    "text": "text: what fires on it",
}
_COLUMNS = ["density", "max", "decoder_norm", "top_logits"]


class Choice(NamedTuple):
    """Which latents a list shows, and in which order."""

    sort: str = "density"
    least: float = 0.0
    """Least density, in percent; latents that never fire are in no list."""
    most: float = 100.0
    """Largest density, in percent."""
    page: int = 0

    @classmethod
    def of(cls, query: dict[str, str]) -> "Choice":
        """Read a choice from an address; raises `ArgumentError`."""
        try:
            choice = cls(
                query.get("sort", "density"),
                float(query.get("least", 0)),
                float(query.get("most", 100)),
                int(query.get("page", 0)),
            )
        except ValueError as exc:
            raise ArgumentError(f"list: {exc}; densities and pages are numbers") from exc
        if choice.sort not in _SORTS:
            raise ArgumentError(f"sort: {choice.sort}: is none of {', '.join(_SORTS)}")
        return choice


class Pages:
    """Pages of a run's latent index; may be asked by several threads.

    Args:
        run: The run.
        index: Name of the index; None takes the complete one of the last step.
        chosen: The latents that there are pages of, if these are files: they link to one another,
            and nothing can be searched.

    Raises:
        NoIndexError: There is no complete index.
    """

    def __init__(self, run: OpenedRun, index: str | None, chosen: Sequence[int] = ()) -> None:
        self._run = run
        self._explorer = Explorer(run.config, index, Style())
        self._chosen = frozenset(chosen)
        self._order = lru_cache(_KEPT_ORDERS)(self._find_order)
        self._turn = threading.Lock()  # texts, the model and its dictionary are read by one thread

    @property
    def place(self) -> str:
        """Path or URL of the index."""
        return self._explorer.index.place

    def listed(self, choice: Choice) -> str:
        """A list of latents."""
        order = self._order(choice._replace(page=0))
        pages = max(1, -(-len(order) // PAGE_LATENTS))
        if not 0 <= choice.page < pages:
            raise ArgumentError(f"page: {choice.page}: there are pages 0 to {pages - 1}")
        shown = order[choice.page * PAGE_LATENTS :][:PAGE_LATENTS].tolist()
        numbers = self._numbers
        return self._render(
            "list",
            "latents",
            latents=[
                {"latent": n, **{k: float(numbers[k][n]) for k in ("density", "max")}}
                for n in shown
            ],
            found=len(order),
            never=int((numbers["density"] == 0).sum()),
            sorts={k: v for k, v in _SORTS.items() if k != "effect" or "effect" in numbers},
            pages=pages,
            at=lambda *place: "/?" + urlencode(Choice(*place)._asdict()),
            **choice._replace(page=0)._asdict() | {"number": choice.page},
        )

    def chosen(self, latents: Sequence[int]) -> str:
        """A list of chosen latents, with the tokens that they fire on."""
        return self._render("chosen", "latents", latents=self.briefs(latents))

    def latent(self, latent: int) -> str:
        """A latent's page; raises `LatentNotFoundError`."""
        with self._turn:
            (view,) = self._explorer.view([latent])
        n = self._explorer.index.n_latents
        turns = [("prev", "back", latent - 1), ("next", "on", latent + 1)]
        there = [turn for turn in turns if 0 <= turn[2] < n and self._href(turn[2])]
        return self._render("latent", f"latent {latent}", view=view, turns=there)

    def search(self, kind: str, asked: str) -> str:
        """Search; returns the page of what is found.

        Raises:
            LatentNotFoundError: There is no latent of this number.
            ArgumentError: The question is none of its kind.
            ModelError: The model, or its tokenizer, is not at hand.
        """
        said = {"kind": kind, "asked": asked}
        if kind == "latent":
            if not asked.strip().isdecimal():
                raise ArgumentError(f"latent: {asked}: is not a number")
            return self.latent(int(asked))
        if kind == "text":
            with self._turn:
                step = self._explorer.index.manifest.step
                tokens = self._run.active_on(asked, _TOP, step)
            return self._render("text", "text", tokens=tokens, **said)
        find = {"token": self._explorer.with_token, "regex": self._explorer.with_regex}.get(kind)
        if find is None:
            raise ArgumentError(f"kind: {kind}: is none of {', '.join(_KINDS)}")
        with self._turn:
            answer = find(asked).content
        return self._render("matches", asked, answer=answer, **said)

    def briefs(self, latents: Sequence[int]) -> list[dict[str, Any]]:
        """Numbers of latents, and the tokens that they fire on; raises `LatentNotFoundError`."""
        with self._turn:
            explorer = self._explorer
            return [explorer.brief(explorer.index.latent(latent)) for latent in latents]

    def error(self, message: str) -> str:
        """A page that says what went wrong."""
        return self._render("error", "error", message=message)

    def _render(self, what: str, title: str, **content: Any) -> str:
        content = {"kind": "latent", "asked": "", **content}
        return render_template(
            "browse.html",
            what=what,
            title=title,
            run=self._run.config.name,
            n_latents=self._explorer.index.n_latents,
            kinds=_KINDS,
            href=self._href,
            home="index.html" if self._chosen else "/",
            is_live=not self._chosen,
            **content,
        )

    @property
    def _href(self) -> Callable[[int], str]:
        if not self._chosen:
            return lambda latent: f"/latent/{latent}"
        return lambda latent: file_name(latent) if latent in self._chosen else ""

    def _find_order(self, choice: Choice) -> NDArray[np.intp]:
        """The latents of a list."""
        numbers = self._numbers
        if choice.sort not in ("rarity", "latent", *numbers):
            raise ArgumentError("sort: effect: the index has no output tokens")
        densities = numbers["density"]
        within = (densities >= choice.least / 100) & (densities <= choice.most / 100)
        there = np.flatnonzero(within & (densities > 0))
        if choice.sort == "latent":
            return there
        key = densities if choice.sort == "rarity" else -numbers[choice.sort]
        return there[np.argsort(key[there], kind="stable")]

    @cached_property
    def _numbers(self) -> dict[str, NDArray[np.float32]]:
        """Numbers of all latents; of a million they take a second to read and 16 MB."""
        parts: dict[str, list[NDArray[np.float32]]] = {"effect": []}
        for table in self._explorer.index.latents(_COLUMNS):
            for name in _COLUMNS[:-1]:
                parts.setdefault(name, []).append(table[name].to_numpy().astype(np.float32))
            logits = table["top_logits"].combine_chunks()
            if len(logits.flatten()):
                tops = logits.flatten().to_numpy().reshape(len(table), -1).max(1)
                parts["effect"].append(tops.astype(np.float32) * parts["max"][-1])
        found = {name: np.concatenate(part) for name, part in parts.items() if part}
        return {("norm" if name == "decoder_norm" else name): part for name, part in found.items()}


def file_name(latent: int) -> str:
    """Name of the file with a latent's page."""
    return f"latent-{latent}.html"
