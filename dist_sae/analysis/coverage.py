"""Coverage of concepts: which have a latent, by frequency, and how wide a dictionary must be."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dist_sae.analysis.chance import WordComparison
from dist_sae.analysis.coverage_figures import figures
from dist_sae.analysis.law import (
    ENOUGH_FIRINGS,
    LEAST_WIDTHS,
    Curve,
    Fitted,
    Interval,
    Law,
    Width,
    fit,
)
from dist_sae.analysis.matching import LEAST_OCCURRENCES, Matched
from dist_sae.analysis.tail import exponent_of
from dist_sae.analysis.words import Concept, WordRows
from dist_sae.errors import ArgumentError
from dist_sae.report.outcome import Findings

LEAST_CONCEPTS = 20
"""Fewest concepts that a curve is fitted to."""


class Covered(NamedTuple):
    """Which concepts one dictionary has, with a table of them and comparisons with chance."""

    width: Width
    table: Mapping[str, Sequence[Any]]
    """Columns by name, with a value for each concept."""
    zipf: float | None
    """Exponent of the rank-frequency curve of the alive latents. None if too few are alive."""
    comparisons: Sequence[WordComparison] = ()
    """Comparisons with the rotated copy, and with the dictionary of `--control`."""
    caveat: str = ""
    """Why the dictionary is not compared with chance. Empty if it is."""

    @property
    def fails_control(self) -> bool:
        """Whether in any comparison the dictionary does not have significantly more words."""
        return any(not each.is_more for each in self.comparisons)


def frequencies(concepts: Sequence[Concept], words: WordRows, share: float) -> NDArray[np.float64]:
    """Return the occurrences of each concept per row, from the index or from the list's counts.

    A list's counts come from another corpus of unknown size. They are scaled so that all words
    together are as frequent as in the rows of the index.

    Args:
        concepts: Words to count.
        words: Rows of the words.
        share: Share of the rows whose activations the index stores.

    Raises:
        ArgumentError: None of the words occurs.
    """
    seen = np.bincount(words.concept[words.is_last], minlength=len(concepts))
    rows = int(words.starts[-1])
    if not seen.any():
        raise ArgumentError(
            f"none of the {len(concepts)} words occurs in the {rows:,} rows of the index; give "
            f"words of this corpus"
        )
    counts = np.array([math.nan if c.times is None else c.times for c in concepts])
    own = seen if np.isnan(counts).any() else counts * (seen.sum() / counts.sum())
    return own / (rows * share)


def judged_words(frequency: NDArray[np.float64], matched: Matched) -> NDArray[np.bool_]:
    """Return a mask of the words that occur often enough to be judged.

    Raises:
        ArgumentError: Fewer than `LEAST_CONCEPTS` words occur often enough.
    """
    judged = matched.judged & (frequency > 0)
    if judged.sum() >= LEAST_CONCEPTS:
        return np.asarray(judged)
    rarer = np.sort(matched.occurrences.min(0))[::-1]
    of_last = int(rarer[LEAST_CONCEPTS - 1]) if len(rarer) >= LEAST_CONCEPTS else 0
    more = f"index about {LEAST_OCCURRENCES / of_last:.1f} times the rows, or " if of_last else ""
    raise ArgumentError(
        f"only {judged.sum()} of the {len(rarer)} words occur {LEAST_OCCURRENCES} times in each "
        f"half of the index, but a curve needs {LEAST_CONCEPTS}; {more}give more words"
    )


def cover_words(
    name: str,
    firings: NDArray[np.int64],
    trained_rows: int,
    concepts: Sequence[Concept],
    frequency: NDArray[np.float64],
    matched: Matched,
    least_f1: float,
    comparisons: Sequence[WordComparison] = (),
    caveat: str = "",
) -> Covered:
    """Find the words of a list that have a latent in one dictionary.

    Args:
        name: Name of the run.
        firings: Firings of each latent.
        trained_rows: Rows that the dictionary was trained on.
        concepts: Words.
        frequency: Frequency of each word.
        matched: Latents that match the words.
        least_f1: Lowest F1 at which a word counts as having its own latent.
        comparisons: Comparisons with other dictionaries.
        caveat: Why the dictionary is not compared with chance.

    Raises:
        ArgumentError: Fewer than `LEAST_CONCEPTS` words occur often enough.
    """
    judged = judged_words(frequency, matched)
    recovered = matched.recovered(least_f1)
    found = [matched.matches.get(number) for number in range(len(concepts))]

    def of_match(field: str) -> list[Any]:
        return [None if match is None else getattr(match, field) for match in found]

    table = {
        "word": [concept.word for concept in concepts],
        "category": [concept.category for concept in concepts],
        "occurrences": matched.occurrences.sum(0).tolist(),
        "frequency": frequency.tolist(),
        "judged": judged.tolist(),
        "recovered": recovered.tolist(),
        **{f: of_match(f) for f in ("latent", "threshold", "f1_chosen", "f1")},
        **{f: of_match(f) for f in ("precision", "recall")},
    }
    alive = int((firings > 0).sum())
    width = Width(name, len(firings), alive, trained_rows, frequency, judged, recovered)
    return Covered(width, table, exponent_of(firings), comparisons, caveat)


def cover_features(
    name: str,
    firings: NDArray[np.int64],
    trained_rows: int,
    probabilities: NDArray[np.float64],
    latent_of: Mapping[int, int],
) -> Covered:
    """Find the features of a synthetic world that have a latent in one dictionary.

    Args:
        name: Name of the run.
        firings: Firings of each latent.
        trained_rows: Rows that the dictionary was trained on.
        probabilities: Probability per row that each feature is active.
        latent_of: Latent of each feature that is matched.
    """
    n = len(probabilities)
    recovered = np.isin(np.arange(n), list(latent_of))
    table = {
        "word": [f"feature {number}" for number in range(n)],
        "category": ["features"] * n,
        "frequency": probabilities.tolist(),
        "judged": [True] * n,
        "recovered": recovered.tolist(),
        "latent": [latent_of.get(number) for number in range(n)],
    }
    alive = int((firings > 0).sum())
    judged = np.ones(n, np.bool_)
    width = Width(name, len(firings), alive, trained_rows, probabilities, judged, recovered)
    return Covered(width, table, exponent_of(firings))


def coverage(covered: Sequence[Covered], forecast: Sequence[float]) -> Findings:
    """Report which concepts have a latent, and what that implies for wider dictionaries.

    Args:
        covered: Dictionaries, with the same concepts.
        forecast: Frequencies of concepts, per row, for which a width is forecast. This needs three
            widths, so the caller calls `check_widths` first.
    """
    widths = [each.width for each in covered]
    fitted = fit(widths, forecast)
    known = not any(each.fails_control for each in covered)
    law = fitted.law if known and fitted.law and _f50_falls(fitted.law) else None
    summary = [
        line
        for each, curve in zip(covered, fitted.curves, strict=True)
        for line in _width_sentences(each, curve)
    ]
    summary += _law_sentences(law) if law else []
    tables = {"concepts": pa.concat_tables([_concepts(each) for each in covered])}
    return Findings(
        numbers={
            "runs": {
                each.width.name: _numbers(each, curve)
                for each, curve in zip(covered, fitted.curves, strict=True)
            },
            "law": _law_numbers(law) if law else None,
        },
        summary=summary,
        caveats=list(_caveats(covered, fitted, law)),
        tables=tables,
        figures=[figure for figure in figures(widths, fitted, law) if figure],
    )


def check_widths(names: Sequence[str]) -> None:
    """Refuse a forecast from fewer widths than a law needs.

    Raises:
        ArgumentError: There are too few widths.
    """
    if len(names) < LEAST_WIDTHS:
        raise ArgumentError(
            f"--frequency: a forecast needs dictionaries of {LEAST_WIDTHS} widths, but there is "
            f"only {len(names)}; name a sweep or more runs"
        )


def _f50_falls(law: Law) -> bool:
    """Return whether f50 falls with width: the exponent's interval is below zero."""
    return law.exponent.high is not None and law.exponent.high < 0


def _width_sentences(covered: Covered, curve: Curve) -> list[str]:
    width = covered.width
    n, has = int(width.judged.sum()), int((width.recovered & width.judged).sum())
    lines = [
        f"{width.name}: {has} of {n} concepts ({has / n:.0%}) have a latent of their own; "
        f"{width.alive:,} of {width.n_latents:,} latents are alive"
    ]
    lines += [_comparison_sentence(width.name, each) for each in covered.comparisons]
    if not has:
        lines.append(f"{width.name}: nothing found: no concept has a latent, so there is no curve")
    elif covered.fails_control:
        lines.append(f"{width.name}: no curve: not significantly more words than a control")
    elif curve.f50.value is None or not _slope_is_positive(curve):
        lines.append(
            f"{width.name}: recovery does not clearly rise with frequency, so f50 is unknown"
        )
    else:
        lines.append(
            f"{width.name}: half of the concepts of frequency {shown(curve.f50)} per row have a "
            f"latent; f50 * alive latents is {shown(curve.f50_alive)}"
        )
        assert curve.firings is not None
        if curve.firings < ENOUGH_FIRINGS:
            rows = ENOUGH_FIRINGS / curve.f50.value
            lines.append(
                f"{width.name}: undertrained: a concept of this frequency occurred "
                f"{curve.firings:,.0f} times in {width.trained_rows:,} training rows; up to "
                f"{ENOUGH_FIRINGS:,} times ({rows:.2g} rows), longer training finds more concepts"
            )
    return lines


def _comparison_sentence(name: str, found: WordComparison) -> str:
    counts = (
        f"on {found.rows:,} rows it has {found.found} of {found.words} words, and {found.of} has "
        f"{found.by_other}"
    )
    if found.is_more:
        return f"{name}: {counts}; {found.found - found.both} of its words are missing there"
    return f"{name}: nothing found beyond {found.of}: {counts} (p = {found.p_value:.2g})"


def _slope_is_positive(curve: Curve) -> bool:
    """Return whether frequent words are recovered more often: the slope's interval is above 0."""
    return curve.slope.low is not None and curve.slope.low > 0


def _law_sentences(law: Law) -> list[str]:
    lines = [
        f"across the widths, f50 falls as alive latents to the power {shown(law.exponent)}",
        f"forecast: with ten times the alive latents of the widest, f50 is {shown(law.ten_times)}",
    ]
    return lines + [
        f"forecast: to have a latent for half of the concepts of frequency {each.frequency:.2g}, "
        f"{shown(each.latents)} alive latents and {each.rows:.2g} training rows are needed"
        for each in law.forecasts
    ]


def _caveats(covered: Sequence[Covered], fitted: Fitted, law: Law | None) -> list[str]:
    lines = [each.caveat for each in covered if each.caveat]
    for each, curve in zip(covered, fitted.curves, strict=True):
        width = each.width
        low, high = (f(width.frequency[width.judged]) for f in (np.min, np.max))
        if curve.f50.value is not None and not low <= curve.f50.value <= high:
            lines.append(
                f"{width.name}: its f50 is outside the frequencies that could be judged "
                f"({low:.2g} to {high:.2g}), so it is an extrapolation of the curve"
            )
    first = covered[0]
    rare = int((~first.width.judged).sum())
    if rare:
        absent = first.table.get("occurrences", []).count(0)
        lines.append(
            f"{rare} of {len(first.width.judged)} concepts are left out because they occur fewer "
            f"than {LEAST_OCCURRENCES} times in at least one half of the index ({absent} never), "
            f"so the rarest concepts are missing here"
        )
    if law is None and len(covered) >= LEAST_WIDTHS:
        lines.append(
            "no law and no forecast: a dictionary found nothing, or f50 does not clearly fall with "
            "width"
        )
    if law is not None:
        lines.append(
            "intervals account for the choice of concepts alone: they assume that the law's form "
            "is right, and a forecast beyond the measured widths is an extrapolation"
        )
    return lines


def _numbers(covered: Covered, curve: Curve) -> dict[str, Any]:
    width = covered.width
    has = width.recovered & width.judged
    names = np.asarray(covered.table["category"])
    return {
        "n_latents": width.n_latents,
        "alive": width.alive,
        "trained_rows": width.trained_rows,
        "concepts": int(width.judged.sum()),
        "recovered": int(has.sum()),
        "recovered_share": float(has.sum() / width.judged.sum()),
        "beyond": [
            {**each._asdict(), "p_value": each.p_value, "is_more": each.is_more}
            for each in covered.comparisons
        ],
        "nothing": covered.fails_control or not has.any(),
        "recovered_by_category": {
            category: [
                int(has[names == category].sum()),
                int(width.judged[names == category].sum()),
            ]
            for category in Counter(covered.table["category"])
        },
        "f50": curve.f50._asdict(),
        "f50_alive": curve.f50_alive._asdict(),
        "log_odds_per_decade": curve.slope._asdict(),
        "f50_firings": curve.firings,
        "zipf_exponent": covered.zipf,
    }


def _law_numbers(law: Law) -> dict[str, Any]:
    return {
        "exponent": law.exponent._asdict(),
        "scale": law.scale,
        "f50_of_ten_times": law.ten_times._asdict(),
        "forecasts": [
            {"frequency": f.frequency, "alive": f.latents._asdict(), "training_rows": f.rows}
            for f in law.forecasts
        ],
    }


def _concepts(covered: Covered) -> pa.Table:
    n = len(covered.table["word"])
    types = {"latent": pa.int64(), "word": pa.string(), "category": pa.string()}
    types |= {"occurrences": pa.int64(), "judged": pa.bool_(), "recovered": pa.bool_()}
    columns = {
        name: pa.array(values, types.get(name, pa.float64()))
        for name, values in covered.table.items()
    }
    return pa.table({"run": pa.array([covered.width.name] * n), **columns})


def shown(interval: Interval) -> str:
    """Format a number with its interval, for a sentence."""
    if interval.value is None:
        return "unknown"
    if interval.low is None or interval.high is None:
        return f"{interval.value:.3g} (interval unknown)"
    return f"{interval.value:.3g} ({interval.low:.2g} to {interval.high:.2g})"
