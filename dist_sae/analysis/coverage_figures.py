"""Figures of `dist-sae analyse coverage`."""

from collections.abc import Sequence

import numpy as np

from dist_sae.analysis.law import Fitted, Law, Width
from dist_sae.report.charts import Line, ReferenceLine, render_lines

_BINS = 8
"""Number of equal groups of concepts whose shares a figure shows."""


def figures(widths: Sequence[Width], fitted: Fitted, law: Law | None) -> list[str]:
    """Draw the share of concepts that have a latent, by frequency, and f50 by width."""
    shares = [_shares(width) for width in widths]
    pairs = list(zip(widths, shares, strict=True))
    level = ReferenceLine("half", 0.5)
    drawn = [
        render_lines(
            "Share of the concepts that have a latent",
            [Line(width.name, *share) for width, share in pairs],
            x_label="occurrences per row",
            reference=level,
            from_zero=True,
            log_x=True,
        ),
        render_lines(
            "The same, by frequency times alive latents",
            [Line(w.name, [x * max(1, w.alive) for x in s[0]], s[1]) for w, s in pairs],
            x_label="occurrences per row * alive latents",
            reference=level,
            from_zero=True,
            log_x=True,
        ),
    ]
    if law is not None:
        known = [
            (width.alive, curve.f50.value)
            for width, curve in zip(widths, fitted.curves, strict=True)
            if curve.f50.value is not None
        ]
        alive = sorted(of for of, _ in known)
        ends = [float(alive[0]), 10.0 * alive[-1]]
        exponent = law.exponent.value or 0.0
        lines = [Line("law", ends, [law.scale * end**exponent for end in ends])]
        lines += [Line(f"{of:,} alive", [float(of)], [f50]) for of, f50 in known]
        drawn.append(render_lines("f50 by width", lines, x_label="alive latents", log_x=True))
    return drawn


def _shares(width: Width) -> tuple[list[float], list[float]]:
    """Return geometric mean frequencies and recovered shares of groups of judged concepts."""
    order = np.argsort(width.frequency[width.judged], kind="stable")
    x = np.log(width.frequency[width.judged])[order]
    y = width.recovered[width.judged][order]
    parts = min(_BINS, len(order))
    return (
        [float(np.exp(part.mean())) for part in np.array_split(x, parts)],
        [float(part.mean()) for part in np.array_split(y, parts)],
    )
