"""Tables and figures of `dist-sae analyse dark-matter`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from dist_sae.analysis.dark_matter import Study
from dist_sae.analysis.seeds import Overlap
from dist_sae.analysis.tail import Span
from dist_sae.report.charts import Line, render_lines

_PLACES = 256  # most points of a curve over ranks


class Check(NamedTuple):
    """A held-out test: a dictionary's tail as predicted from narrower ones, and as measured."""

    narrower: tuple[Study, ...]
    """One dictionary gives a floor, from its energies. Two give a forecast, from the gain between
    them."""
    wider: Study
    predicted: Span
    measured: Span

    @property
    def verdict(self) -> str:
        """Where the measured tail is: `above` or `below` the predicted interval, or `within` it.

        It is `within` if the two intervals overlap.
        """
        if self.measured.low > self.predicted.high:
            return "above"
        return "below" if self.measured.high < self.predicted.low else "within"


def rank_table(studies: Sequence[Study]) -> pa.Table:
    """Return a table of firing frequencies and energies at some ranks."""
    rows: dict[str, list[Any]] = {"run": [], "rank": [], "density": [], "energy": []}
    for study in studies:
        for rank in _places(study.alive):
            rows["run"].append(study.name)
            rows["rank"].append(rank)
            rows["density"].append(float(study.densities[rank - 1]))
            rows["energy"].append(float(study.energies[rank - 1]))
    kinds = [pa.string(), pa.int64(), pa.float64(), pa.float64()]
    return pa.table(rows, schema=pa.schema(list(zip(rows, kinds, strict=True))))


def overlap_table(overlaps: Mapping[tuple[str, str], Overlap]) -> pa.Table:
    """Return a table of the share of latents with a partner, by tenth of firing frequency."""
    kinds = {
        "run": pa.string(),
        "other": pa.string(),
        "tenth": pa.int32(),
        "density": pa.float64(),
        "share": pa.float64(),
        "low": pa.float64(),
        "high": pa.float64(),
    }
    rows = [
        (*names, tenth, density, share, *interval)
        for names, each in overlaps.items()
        for tenth, (density, share, interval) in enumerate(
            zip(each.densities, each.shares, each.intervals, strict=True)
        )
    ]
    columns = zip(*rows, strict=True) if rows else [()] * len(kinds)
    arrays = [pa.array(c, k) for c, k in zip(columns, kinds.values(), strict=True)]
    return pa.table(arrays, names=list(kinds))


def figures(
    studies: Sequence[Study],
    checks: Sequence[Check],
    overlaps: Mapping[tuple[str, str], Overlap],
) -> Iterator[str]:
    """Draw frequencies, energies, tails and overlaps; yield "" for figures without points."""
    for what, title in (
        ("densities", "Firing frequency by rank"),
        ("energies", "Energy by rank, as a share of the variance"),
    ):
        lines = []
        for study in studies:
            ranks = [rank for rank in _places(study.alive) if getattr(study, what)[rank - 1] > 0]
            values = [float(getattr(study, what)[rank - 1]) for rank in ranks]
            lines.append(Line(study.name, np.log10(ranks).tolist(), values))
        yield render_lines(title, lines, x_label="log10 of the rank")
    measured = sorted((s for s in studies if s.tail), key=lambda study: study.alive)
    if len(measured) > 1:
        wide = [math.log10(study.alive) for study in measured]
        lines = [
            Line("FVU", wide, [study.parts.numbers["fvu"] for study in measured]),
            Line("tail", wide, [study.tail.residual.value for study in measured if study.tail]),
        ]
        for one in measured[:-1]:
            own = [
                check for check in checks if check.narrower[0] is one and len(check.narrower) == 1
            ]
            if own and one.tail:
                x = [math.log10(s.alive) for s in (one, *(check.wider for check in own))]
                y = [one.tail.residual.value, *(check.predicted.value for check in own)]
                lines.append(Line(f"floor from {one.name}", x, y))
        title = "FVU, tail and predicted floor by width"
        yield render_lines(title, lines, x_label="log10 of the alive latents", from_zero=True)
    if overlaps:
        lines = [
            Line(f"{one} in {other}", np.log10(each.densities).tolist(), each.shares)
            for (one, other), each in overlaps.items()
        ]
        title = "Share of latents with a partner, by firing frequency"
        yield render_lines(title, lines, x_label="log10 of the density", from_zero=True)


def _places(alive: int) -> list[int]:
    """Return ranks from 1 to `alive`, evenly spaced in their logarithm."""
    if not alive:
        return []
    ranks = np.exp(np.linspace(0, math.log(alive), _PLACES)).round().astype(int)
    found: list[int] = np.unique(np.clip(ranks, 1, alive)).tolist()
    return found
