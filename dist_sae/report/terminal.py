"""Latents of an index for a terminal, as lines for people and as JSON for programs."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dist_sae.config import Run
from dist_sae.data.plan import load_plan
from dist_sae.errors import CorpusError, ModelError, PlanMismatchError
from dist_sae.index.query import Index, LatentPage
from dist_sae.index.search import LEAST_EXAMPLES, TokenTest, regex_test, search, token_test
from dist_sae.index.summary import left_out
from dist_sae.index.texts import Example, Texts
from dist_sae.report.latents import LatentView, token_text, view_latents
from dist_sae.storage import open_store

logger = logging.getLogger(__name__)

_SHOWN = 5  # latents per group
_TOKENS = 3  # tokens per latent in a list
_KEPT_DOCUMENTS = 4096  # cached documents of earlier latents, whose tokens take up to about 100 MB
_BOLD, _PLAIN = "\033[1m", "\033[0m"


class Answer(NamedTuple):
    """The answer to a question about an index, for programs and for people."""

    content: Any
    """The answer as JSON types, for programs."""
    lines: list[str]


class Style(NamedTuple):
    """The style of lines in a terminal."""

    width: int = 100
    bold: bool = False


class Explorer:
    """Answers questions about a run's index.

    Args:
        run: The run.
        name: Name of the index; None takes the complete index of the latest step.
        style: Style of the lines.

    Raises:
        NoIndexError: The index does not exist, or is not complete.
    """

    def __init__(self, run: Run, name: str | None, style: Style) -> None:
        self.index = Index(open_store(run.store.runs, run.store.s3), run.name, name)
        self._run = run
        self._style = style
        self._texts = self._open_texts()

    def overview(self) -> Answer:
        """List the densest latents that fire, some random ones, and the rarest."""
        firings = self.index.firings
        alive = np.flatnonzero(firings)
        order = alive[np.argsort(-firings[alive], kind="stable")]
        chance = np.random.default_rng(self._run.train.seed).permutation(order)
        groups = {
            "densest": order[:_SHOWN].tolist(),
            "by chance": chance[:_SHOWN].tolist(),
            "rarest": order[max(0, len(order) - _SHOWN) :].tolist(),
        }
        pages = {name: self._pages(latents) for name, latents in groups.items()}
        never = len(firings) - len(alive)
        lines = [
            f"{self.index.place}: {len(firings):,} latents, {never:,} of them never fire",
            *(line for name in pages for line in (f"{name}:", *map(self._short, pages[name]))),
        ]
        groups_as_json = {name: list(map(self.brief, pages[name])) for name in pages}
        content = {"latents": len(firings), "never_fired": never, **groups_as_json}
        return Answer({"index": self.index.place, **content}, lines)

    def latents(self, latents: Sequence[int]) -> Answer:
        """Return everything about some latents.

        Raises:
            LatentNotFoundError: The dictionary has no such latent.
        """
        views = self.view(latents)
        lines = [line for view in views for line in (*self._full(view), "")]
        return Answer([_as_json(view) for view in views], lines[:-1])

    def view(self, latents: Sequence[int], of_decile: int = 1) -> list[LatentView]:
        """View latents, with their texts if these can be read.

        Args:
            latents: Numbers of the latents.
            of_decile: Most examples of each decile.

        Raises:
            LatentNotFoundError: The dictionary has no such latent.
        """
        if self._texts:
            self._texts.forget(_KEPT_DOCUMENTS)
        try:
            return view_latents(self.index, latents, self._texts, 2 * _SHOWN, of_decile)
        except CorpusError as error:
            logger.warning("texts are left out: %s", error)
            return view_latents(self.index, latents, None)

    def similar(self, latent: int) -> Answer:
        """List the latents nearest to one by decoder direction, and the most coactive ones.

        Raises:
            LatentNotFoundError: The dictionary has no such latent.
        """
        page = self.index.latent(latent)
        nearest = {near.latent: near.cosine for near in page.nearest[: 2 * _SHOWN]}
        coactive = {other.latent: other.phi for other in page.coactive[: 2 * _SHOWN]}
        content: dict[str, Any] = {"latent": self.brief(page)}
        lines = [self._short(page)]
        for name, measure, found in (
            ("nearest", "cosine", nearest),
            ("coactive", "phi", coactive),
        ):
            pages = self._pages(list(found))
            content[name] = [self.brief(p) | {measure: found[p.latent]} for p in pages]
            lines.append(f"{name} ({measure}):" if pages else f"{name}: none in the index")
            lines += [f"{found[p.latent]:6.3f} {self._short(p)}" for p in pages]
        lines += [f"left out: {part}" for part in left_out(self.index.manifest)]
        return Answer(content, lines)

    def with_token(self, text: str) -> Answer:
        """Find latents whose largest activations are on one token.

        Raises:
            ArgumentError: The text is not a single token of the model.
            ModelError: The tokenizer cannot be loaded.
        """
        is_match = token_test(self.texts.tokenizer, text)
        return self._matching(is_match, f'"{text}"')

    def with_regex(self, pattern: str) -> Answer:
        """Find latents whose largest activations are on tokens that match a regular expression.

        Raises:
            ArgumentError: The pattern is not a valid regular expression.
            ModelError: The tokenizer cannot be loaded.
        """
        texts = self.texts
        is_match = regex_test(lambda token: token_text(token, texts), pattern)
        return self._matching(is_match, f"/{pattern}/")

    def _matching(self, is_match: TokenTest, what: str) -> Answer:
        found = search(self.index, is_match)
        best = found[: 4 * _SHOWN]
        lines = [
            f"{len(found):,} latents have {what} among the tokens of their largest activations "
            f"(only latents with at least {LEAST_EXAMPLES} of them)"
        ]
        content = []
        for match, page in zip(best, self._pages([match.latent for match in best]), strict=True):
            lines.append(f"{match.hits} of {match.examples}  {self._short(page).strip()}")
            numbers = {"share": match.share, "examples": match.examples}
            content.append({**self.brief(page), **numbers})
        return Answer({"matching": len(found), "latents": content}, lines)

    def _open_texts(self) -> Texts | None:
        try:
            plan = load_plan(open_store(self._run.store.activations, self._run.store.s3), self._run)
            return Texts(self._run, plan)
        except (CorpusError, ModelError, PlanMismatchError) as error:
            self._problem = error
            logger.warning("texts are left out: %s", error)
            return None

    @property
    def texts(self) -> Texts:
        """The texts of the run, with its tokenizer.

        Raises:
            ModelError: The corpus, the tokenizer or the plan cannot be read.
        """
        if self._texts is None:
            raise ModelError(f"tokens cannot be read: {self._problem}")
        return self._texts

    def token(self, token: int) -> str:
        """Return the text of a single token, or its number if there is no tokenizer."""
        return token_text(token, self._texts)

    def _pages(self, latents: Sequence[int]) -> list[LatentPage]:
        return [self.index.latent(latent) for latent in latents]

    def _fires_on(self, page: LatentPage) -> list[str]:
        """Return the most frequent tokens of the largest activations."""
        counts = Counter(example.token for example in page.largest)
        return [token_text(token, self._texts) for token, _ in counts.most_common(_SHOWN)]

    def brief(self, page: LatentPage) -> dict[str, Any]:
        """Return a latent's main numbers, and the tokens that it fires on and raises most."""
        return {
            "latent": page.latent,
            "firings": page.firings,
            "density": page.density,
            "max": page.max,
            "fires_on": self._fires_on(page),
            "raises": [token_text(output.token, self._texts) for output in page.top_tokens],
        }

    def _short(self, page: LatentPage) -> str:
        brief = self.brief(page)
        raises = _tokens(brief["raises"][:_TOKENS])
        return (
            f"{page.latent:9}  {100 * page.density:7.3g} %  max {page.max:<7.4g} "
            f"on {_tokens(brief['fires_on'][:_TOKENS])}" + (f"  raises {raises}" if raises else "")
        )

    def _full(self, view: LatentView) -> Iterator[str]:
        page = view.page
        yield f"latent {page.latent}"
        for scored in view.explanations:
            yield f"  explained {_quoted(scored.explanation)}"
            yield f"            ({scored.name}{scored.score_text and f'; {scored.score_text}'})"
        yield (
            f"  fires     on {100 * page.density:.3g} % of rows ({page.firings:,} times), denser "
            f"than {100 * view.denser_than:.3g} % of latents"
        )
        deciles = " ".join(f"{value:.3g}" for value in page.deciles)
        yield f"  act       mean {page.mean:.4g}, max {page.max:.4g}, deciles {deciles}"
        yield f"  histogram {_bars(page.histogram)} from 0 to the maximum"
        yield (
            f"  weights   decoder norm {page.decoder_norm:.3g}, encoder norm "
            f"{page.encoder_norm:.3g}, encoder bias {page.encoder_bias:.3g}"
        )
        if page.norms:
            bars = _bars([round(1000 * share) for share in page.profile.values()])
            found = [f"{site} {100 * share:.0f} %" for site, share in page.profile.items()]
            yield self._fit(f"  writes    {bars} ", found)
        for name, outputs in (("raises", view.top_tokens), ("lowers", view.bottom_tokens)):
            if outputs:
                yield self._fit(f"  {name}   ", [f"{_quoted(t)} {x:.3g}" for t, x in outputs])
        if page.nearest:
            found = [f"{near.latent} {near.cosine:.2f}" for near in page.nearest]
            yield self._fit("  nearest  ", found)
        if page.coactive:
            found = [f"{other.latent} {other.phi:.2f}" for other in page.coactive]
            yield self._fit("  coactive ", found)
        for part in left_out(self.index.manifest):
            yield f"  left out  {part}"
        if view.examples:
            yield "  largest activations"
            yield from (f"  {self._example(example)}" for example in view.examples)
        if view.sampled:
            yield "  one from each tenth of its activations"
            yield from (f"  {self._example(example)}" for example, *_ in view.sampled.values())

    def _fit(self, line: str, items: Sequence[str]) -> str:
        """Extend a line by as many items as fit."""
        for item in items:
            if len(line) + 1 + len(item) > self._style.width:
                break
            line += f" {item} "
        return line.rstrip()

    def _example(self, example: Example) -> str:
        """Return a line with the text around the peak, which is in brackets."""
        before, peak, after = (
            "".join(token.text for token in part)
            for part in (
                example.tokens[: example.peak],
                example.tokens[example.peak : example.peak + 1],
                example.tokens[example.peak + 1 :],
            )
        )
        word = peak.lstrip(" ")
        before, word, after = map(_one_line, (before + peak[: len(peak) - len(word)], word, after))
        room = max(20, self._style.width - 16 - len(word))
        after = after[: max(room // 3, room - len(before))]
        before = before[max(0, len(before) - (room - len(after))) :]
        on, off = (_BOLD, _PLAIN) if self._style.bold else ("", "")
        return f"{example.act:9.4g}  {before}{on}[{word}]{off}{after}"


def text_lines(found: Sequence[Any]) -> list[str]:
    """Return a line per token of a text, with the latents that are active on the token."""
    lines = []
    for token, latents, acts in found:
        pairs = "  ".join(f"{latent} {act:.3g}" for latent, act in zip(latents, acts, strict=True))
        lines.append(f"{_quoted(token):20}  {pairs or '-'}")
    return lines


def _as_json(view: LatentView) -> dict[str, Any]:
    page = view.page
    return {
        **page._asdict(),
        "denser_than": view.denser_than,
        "nearest": [each._asdict() for each in page.nearest],
        "coactive": [each._asdict() for each in page.coactive],
        "top_tokens": _ends(page.top_tokens, view.top_tokens),
        "bottom_tokens": _ends(page.bottom_tokens, view.bottom_tokens),
        "examples": [firing._asdict() for firing in page.examples],
        "texts": [_text(example) for example in view.examples],
        "explanations": [scored.as_json() for scored in view.explanations],
        "decile_texts": {str(decile): _text(e) for decile, (e, *_) in view.sampled.items()},
    }


def _ends(outputs: Sequence[Any], named: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    pairs = zip(outputs, named, strict=True)
    return [{**output._asdict(), "text": text} for output, (text, _) in pairs]


def _text(example: Example) -> dict[str, Any]:
    return {
        "act": example.act,
        "document": example.document,
        "position": example.position,
        "tokens": [token.text for token in example.tokens],
        "acts": [token.act for token in example.tokens],
        "peak": example.peak,
    }


def _tokens(texts: Sequence[str]) -> str:
    return " ".join(map(_quoted, texts))


def _quoted(text: str) -> str:
    return f'"{_one_line(text)}"'


def _one_line(text: str) -> str:
    """Replace line breaks and control characters, which a terminal would execute."""
    plain = (" " if c.isspace() else c if c.isprintable() else "\ufffd" for c in text)
    return "".join("\u21b5" if c == "\n" else shown for c, shown in zip(text, plain, strict=True))


def _bars(counts: Sequence[int]) -> str:
    most = max(*counts, 1)
    return "".join(chr(0x2580 + max(1, round(8 * n / most))) if n else " " for n in counts)
