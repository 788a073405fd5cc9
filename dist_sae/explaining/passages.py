"""Passages for explaining a latent, and others for judging the explanation.

A passage is a piece of a context, `PassageSettings.tokens` long. Passages in which the latent fires
are active, and the others are silent. Active passages are sorted by their largest activation and
divided into deciles. The judge gets three kinds of passages:

- active passages, evenly from the deciles,
- random silent passages,
- near misses: silent passages in which a latent with a similar decoder direction fires.

The explainer gets other active passages: the most active ones, and some of each decile. The seed,
the latent and the index decide all choices. Passages come from at most `UNITS` units, so that the
cost does not grow with the index.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_sae.errors import CorpusError
from dist_sae.explaining.scoring import Kind
from dist_sae.index.layout import DECILES
from dist_sae.index.query import Index
from dist_sae.index.texts import Texts, token_texts

UNITS = 64
"""Most units that passages are drawn from."""
NEAR_LATENTS = 5
"""Number of nearest latents whose passages can be near misses."""
_CELL_BITS = 31  # bits for the number of a passage within its document

Ints = NDArray[np.int64]


class PassageSettings(NamedTuple):
    """The number and length of passages."""

    tokens: int = 32
    shown: int = 20
    """Passages for the explainer. Half are the most active ones, half are from all deciles."""
    per_decile: int = 2
    """Active passages of each decile for the judge."""
    silent: int = 20
    """Random silent passages for the judge. The number of near misses is the same."""


class Passage(NamedTuple):
    """A piece of text, with a latent's activations on it."""

    document: int
    position: int
    """Position of the first token in the document."""
    decile: int | None
    """Decile among the active passages, from 0 (least active); None if the latent is silent."""
    kind: Kind
    tokens: list[str]
    acts: list[float]

    @property
    def text(self) -> str:
        """The text of the passage."""
        return "".join(self.tokens)


class SampledPassages(NamedTuple):
    """The passages that were drawn for a latent."""

    shown: list[Passage]
    """Passages for the explainer: the most active ones, then some of all deciles, each in
    descending order."""
    judged: list[Passage]
    """Passages for the judge, in random order."""
    active: int
    """Number of passages with an active latent in the units that passages are drawn from."""


class _Cell(NamedTuple):
    number: int
    kind: Kind
    decile: int | None


class PassageSampler:
    """Draws passages of an index.

    Args:
        index: The index, which must store all postings.
        texts: Texts of the index's run.
        settings: The number and length of passages.
        seed: Seed of all choices.

    Raises:
        CorruptObjectError: The index is damaged.
    """

    def __init__(self, index: Index, texts: Texts, settings: PassageSettings, seed: int) -> None:
        self._index, self._texts, self._settings, self._seed = index, texts, settings, seed
        units = np.array(index.manifest.units)
        if len(units) > UNITS:
            units = np.sort(np.random.default_rng(seed).choice(units, UNITS, replace=False))
        within, length = texts.context_tokens, settings.tokens
        self._pieces = -(-within // length)
        self._of_row: dict[int, Ints] = {}
        keys: list[Ints] = []
        sizes: list[Ints] = []
        unit_of: list[Ints] = []
        first = 0
        for unit in units.tolist():
            rows = index.origins(unit)
            position, document = (rows[name].to_numpy() for name in ("position", "document"))
            context, place = np.divmod(position.astype(np.int64), within)
            key = document << _CELL_BITS | context * self._pieces + place // length
            found, of_row, counts = np.unique(key, return_inverse=True, return_counts=True)
            self._of_row[unit] = of_row.reshape(-1) + first
            first += len(found)
            keys.append(found)
            sizes.append(counts)
            unit_of.append(np.full(len(found), unit))
        none = [np.empty(0, np.int64)]
        self._keys, self._sizes, self._unit_of = (
            np.concatenate(none + parts) for parts in (keys, sizes, unit_of)
        )

    def sample(self, latent: int) -> SampledPassages:
        """Draw the passages of a latent, or as many as there are.

        Raises:
            LatentNotFoundError: The dictionary has no such latent.
            CorpusError: The text differs from the text that activations were computed from.
            CorruptObjectError: The index is damaged.
        """
        settings, rng = self._settings, np.random.default_rng((self._seed, latent))
        largest = self._largest(latent)
        able = 2 * self._sizes >= settings.tokens  # short ends of documents are uninformative
        active = np.flatnonzero((largest > 0) & able)
        active = active[np.argsort(largest[active], kind="stable")]
        decile = np.arange(len(active)) * DECILES // max(1, len(active))
        for_judge, shown = _split(decile, settings, rng)
        judged = [_Cell(int(active[i]), "active", int(decile[i])) for i in for_judge]
        silent = np.flatnonzero((largest == 0) & able)
        near = self._near(latent, silent, rng)
        others = np.setdiff1d(silent, near)
        by_chance = rng.permutation(others)[: settings.silent]
        judged += [_Cell(int(cell), "random", None) for cell in by_chance]
        judged += [_Cell(int(cell), "near", None) for cell in near]
        judged = [judged[i] for i in rng.permutation(len(judged))]
        cells = [_Cell(int(active[i]), "active", int(decile[i])) for i in shown] + judged
        passages = self._passages(latent, cells)
        return SampledPassages(passages[: len(shown)], passages[len(shown) :], len(active))

    def _firings(self, latent: int) -> Iterator[tuple[int, Ints, NDArray[np.float32]]]:
        """Yield rows and activations of the latent's firings in each of the units."""
        for table in self._index.postings(latent):
            unit_of, rows, acts = (table[name].to_numpy() for name in ("unit", "row", "act"))
            for unit in np.intersect1d(unit_of, list(self._of_row)).tolist():
                here = unit_of == unit
                yield unit, rows[here].astype(np.int64), acts[here]

    def _largest(self, latent: int) -> NDArray[np.float32]:
        """Compute the latent's largest activation in each passage."""
        found = np.zeros(len(self._keys), np.float32)
        for unit, rows, acts in self._firings(latent):
            np.maximum.at(found, self._of_row[unit][rows], acts)
        return found

    def _near(self, latent: int, silent: Ints, rng: np.random.Generator) -> Ints:
        """Find the silent passages in which near latents fire most, equally many of each latent."""
        page, chosen = self._index.latent(latent), list[int]()
        others = [near.latent for near in page.nearest[:NEAR_LATENTS] if near.cosine > 0]
        lists = []
        for other in others:
            acts = self._largest(other)[silent]
            order = rng.permutation(len(silent))  # breaks ties at random
            order = order[np.argsort(-acts[order], kind="stable")]
            lists.append(silent[order[acts[order] > 0]].tolist())
        while any(lists) and len(chosen) < self._settings.silent:
            for cells in lists:
                while cells and cells[0] in chosen:
                    cells.pop(0)
                if cells and len(chosen) < self._settings.silent:
                    chosen.append(cells.pop(0))
        return np.array(chosen, np.int64)

    def _passages(self, latent: int, cells: Sequence[_Cell]) -> list[Passage]:
        """Read the texts of passages, with the latent's activations."""
        acts: dict[int, dict[int, float]] = {cell.number: {} for cell in cells}
        for unit, rows, values in self._firings(latent):
            position = self._index.origins(unit)["position"].to_numpy()
            of_row = self._of_row[unit][rows]
            for i in np.flatnonzero(np.isin(of_row, list(acts))).tolist():
                acts[int(of_row[i])][int(position[rows[i]])] = float(values[i])
        documents = self._keys >> _CELL_BITS
        for unit in np.unique([self._unit_of[cell.number] for cell in cells]).tolist():
            here = [cell.number for cell in cells if self._unit_of[cell.number] == unit]
            self._texts.read(unit, documents[here].tolist())
            self._check(unit, here)
        return [self._passage(cell, acts[cell.number]) for cell in cells]

    def _check(self, unit: int, cells: Sequence[int]) -> None:
        """Check that the text has the tokens that the activations were computed from."""
        rows = np.flatnonzero(np.isin(self._of_row[unit], cells))
        table = self._index.origins(unit).take(rows)
        for token, position, document in zip(*(c.to_pylist() for c in table.columns), strict=True):
            ids = self._texts.tokens(document)
            if position >= len(ids) or ids[position] != token:
                raise CorpusError(
                    f"corpus: document {document} is not the text that the activations were "
                    f"computed from; restore the files that the plan names"
                )

    def _passage(self, cell: _Cell, acts: dict[int, float]) -> Passage:
        document, place = divmod(int(self._keys[cell.number]), 1 << _CELL_BITS)
        context, piece = divmod(place, self._pieces)
        ids, within = self._texts.tokens(document), self._texts.context_tokens
        first = context * within + piece * self._settings.tokens
        last = min(first + self._settings.tokens, (context + 1) * within, len(ids))
        tokens: list[str] = []
        values: list[float] = []
        window = range(first, last)
        for position, text in zip(
            window, token_texts(ids, window, self._texts.tokenizer), strict=True
        ):
            act = acts.get(position, 0.0)
            if text or not tokens:
                tokens.append(text)
                values.append(act)
            else:  # the text of this token is part of the one before
                values[-1] = max(values[-1], act)
        return Passage(document, first, cell.decile, cell.kind, tokens, values)


def _split(decile: Ints, settings: PassageSettings, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Split active passages between the judge and the explainer.

    The judge's passages are chosen first, evenly from the deciles and at most half of them all. So
    even if there are few passages, each decile is judged. Of the other passages, the explainer gets
    the most active ones, then some of each decile.

    Args:
        decile: Decile of each active passage, sorted by activation.
        settings: The number of passages.
        rng: Source of random numbers.

    Returns:
        Indices of the passages for the judge, and for the explainer.
    """
    places = np.arange(len(decile))
    n = min(DECILES * settings.per_decile, len(places) // 2)
    judged = _evenly(places, decile, rng)[:n]
    left = np.setdiff1d(places, judged)
    top = left[::-1][: -(-settings.shown // 2)]
    left = np.setdiff1d(left, top)
    spread = _evenly(left, decile, rng)[: settings.shown - len(top)]
    return judged, np.concatenate([top, np.sort(spread)[::-1]])


def _evenly(places: Ints, decile: Ints, rng: np.random.Generator) -> Ints:
    """Shuffle places so that any first n have the same number from each decile, where possible."""
    order = rng.permutation(places)
    turns = np.empty(len(order), np.int64)
    for d in range(DECILES):
        here = decile[order] == d
        turns[here] = np.arange(here.sum())
    return order[np.argsort(turns, kind="stable")]
