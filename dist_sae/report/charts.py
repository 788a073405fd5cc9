"""Charts as hand-written inline SVG.

The few kinds of chart are not worth a dependency on matplotlib. Inline SVG also takes its colors
and font from the page, so the same file works in light mode, in dark mode and on paper.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import NamedTuple

_WIDTH, _HEIGHT = 520, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 12, 40
_BUCKETS = 240  # points that a line is reduced to; a band shows the range of the points in each
PALETTE = 8
"""Number of line colors in the style sheet. Further lines start again with the first color."""
_LOG_FROM = 8.0  # ratio of the largest to the smallest y above which the axis is logarithmic


_Point = tuple[float, float, float, float]
"""Mean x of a bucket of points, and mean, minimum and maximum of y."""


class Line(NamedTuple):
    """A line of a chart. Points that are not finite are skipped."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    gaps: Sequence[bool] = ()
    """Whether the line is broken before each point. If empty, the line has no gaps."""


class ReferenceLine(NamedTuple):
    """A reference value to compare lines with."""

    name: str
    y: float


class _Axis(NamedTuple):
    low: float
    high: float
    ticks: list[float]
    place: Callable[[float], float]
    """Function from a value to its place on the axis, from 0 to 1."""


def render_lines(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    reference: ReferenceLine | None = None,
    from_zero: bool = False,
    log_x: bool = False,
) -> str:
    """Draw lines over one x axis.

    Args:
        title: Title above the plot.
        lines: The lines. A long line is reduced to the means of consecutive points, with a band
            from their minimum to their maximum.
        x_label: Quantity and unit of x.
        reference: A reference value, drawn as a dashed line across the plot.
        from_zero: Whether the y axis is linear and starts at zero.
        log_x: Whether the x axis is logarithmic. Then all x must be positive.
    """
    if log_x:
        lines = [line._replace(x=[math.log10(x) for x in line.x]) for line in lines]
    series = [(line.name, list(_thin(line))) for line in lines]
    points = [point for _, pieces in series for piece in pieces for point in piece]
    if not points:
        return ""
    values = [v for point in points for v in point[1:]] + ([reference.y] if reference else [])
    last_x = max(p[0] for p in points)
    x_axis = _exponents(min(p[0] for p in points), last_x) if log_x else _linear(0.0, last_x, 5)
    wide = min(values) > 0 and max(values) / min(values) > _LOG_FROM
    y_axis = (
        _log(min(values), max(values)) if wide and not from_zero else _padded(values, from_zero)
    )
    parts = [_frame(x_axis, y_axis, x_label, exponents=log_x)]
    for number, (name, pieces) in enumerate(series):
        for piece in pieces:
            last = pieces[-1][-1][1]
            parts.append(_drawn_line(f"{name}: last {last:.4g}", piece, x_axis, y_axis, number))
    legend = _keys([name for name, _ in series])
    if reference is not None:
        y = _y(y_axis, reference.y)
        parts.append(f'<line class="mark" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="dot" cx="{_WIDTH - _RIGHT}" cy="{y}" r="4"/>')
        legend.append(f'<span class="key mark">{escape(reference.name)}</span>')
    return _figure(title, parts, legend if len(legend) > 1 else [])


def render_histogram(
    title: str, edges: Sequence[float], counts: Sequence[int], *, x_label: str, log10: bool = True
) -> str:
    """Draw a histogram.

    Args:
        title: Title above the plot.
        edges: Edges of the bars, one more than there are bars.
        counts: Number of latents in each bar.
        x_label: Quantity and unit of x.
        log10: Whether the edges are decimal logarithms. Then all but one of the empty bars at
            either end are omitted.
    """
    if not any(counts):
        return ""
    if log10:
        used = [i for i, count in enumerate(counts) if count]
        first, last = max(0, used[0] - 1), min(len(counts), used[-1] + 2)
        edges, counts = edges[first : last + 1], counts[first:last]
    x_axis = _exponents(edges[0], edges[-1]) if log10 else _linear(edges[0], edges[-1], 5)
    y_axis = _linear(0, max(counts) * 1.05, 4)
    bars = []
    for left, right, count in zip(edges, edges[1:], counts, strict=False):
        x, y = _x(x_axis, left), _y(y_axis, count)
        width, height = _x(x_axis, right) - x, _HEIGHT - _BOTTOM - y
        start, stop = (10**left, 10**right) if log10 else (left, right)
        said = f"{count} latents, {start:.2g} to {stop:.2g}"
        bars.append(
            f'<rect class="bar" x="{x + 0.5:.1f}" y="{y:.1f}" width="{max(width - 1, 0.5):.1f}" '
            f'height="{height:.1f}"><title>{said}</title></rect>'
        )
    return _figure(title, [_frame(x_axis, y_axis, x_label, exponents=log10), *bars], [])


def render_outlines(
    title: str,
    histograms: Sequence[tuple[str, Sequence[int]]],
    edges: Sequence[float],
    *,
    x_label: str,
) -> str:
    """Draw the outlines of several histograms in one plot.

    Args:
        title: Title above the plot.
        histograms: Name of each histogram, and the number of latents in each bar. The plot shows
            shares of their sum.
        edges: Decimal logarithms of the bars' edges, one more than there are bars.
        x_label: Quantity and unit of x.
    """
    used = [i for _, counts in histograms for i, count in enumerate(counts) if count]
    if not used:
        return ""
    x_axis = _exponents(edges[min(used)], edges[max(used) + 1])
    shares = [[count / (sum(counts) or 1) for count in counts] for _, counts in histograms]
    y_axis = _linear(0, 1.05 * max(map(max, shares)), 4)
    parts = [_frame(x_axis, y_axis, x_label, exponents=True)]
    for number, ((name, _), heights) in enumerate(zip(histograms, shares, strict=True)):
        steps = [
            f"{_x(x_axis, edge):.1f},{_y(y_axis, heights[i]):.1f}"
            for i in range(min(used), max(used) + 1)
            for edge in edges[i : i + 2]
        ]
        parts.append(
            f'<polyline class="line {_colour(number)}" points="{" ".join(steps)}">'
            f"<title>{escape(name)}</title></polyline>"
        )
    return _figure(title, parts, _keys([name for name, _ in histograms]))


def render_points(
    title: str,
    points: Sequence[tuple[str, float, float]],
    *,
    x_label: str,
    families: Sequence[str] | None = None,
) -> str:
    """Draw named points, and a line through their Pareto frontier.

    A point is on the frontier if no other has both a lower x and a lower y. Each family of points
    has its own frontier.

    Args:
        title: Title above the plot.
        points: Name, x and y of each point.
        x_label: Quantity and unit of x.
        families: Family of each point; None if all belong to one.
    """
    if not points:
        return ""
    x_axis = _padded([x for _, x, _ in points])
    y_axis = _padded([y for *_, y in points])
    parts = [_frame(x_axis, y_axis, x_label)]
    of_each = families or [""] * len(points)
    for family in dict.fromkeys(of_each):
        ahead, least = [], math.inf
        own = [at for (_, *at), other in zip(points, of_each, strict=True) if other == family]
        for x, y in sorted(own):
            if y < least:
                least = y
                ahead.append(f"{_x(x_axis, x):.1f},{_y(y_axis, y):.1f}")
        said = f"<title>{escape(family)}</title>" if family else ""
        parts.append(f'<polyline class="frontier" points="{" ".join(ahead)}">{said}</polyline>')
    for number, (name, x, y) in enumerate(points):
        place = f'cx="{_x(x_axis, x)}" cy="{_y(y_axis, y)}" r="4"'
        said = f"{name}: {short_number(x)}, {short_number(y)}"
        parts.append(
            f'<circle class="dot {_colour(number)}" {place}><title>{escape(said)}</title></circle>'
        )
    return _figure(title, parts, _keys([name for name, *_ in points]))


class Cloud(NamedTuple):
    """Points of one kind."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def render_cloud(title: str, clouds: Sequence[Cloud], *, x_label: str) -> str:
    """Draw points in a plane whose two axes have the same scale.

    Args:
        title: Title above the plot.
        clouds: Points, colored by kind. Hovering over a point shows the name of its kind.
        x_label: Meaning of the plane.
    """
    xs = [x for cloud in clouds for x in cloud.x]
    ys = [y for cloud in clouds for y in cloud.y]
    if not xs:
        return ""
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    unit = 1.1 * max((max(xs) - min(xs)) / width, (max(ys) - min(ys)) / height) or 1.0
    x_axis, y_axis = (
        _linear(middle - unit * size / 2, middle + unit * size / 2, 5)
        for middle, size in (((max(v) + min(v)) / 2, s) for v, s in ((xs, width), (ys, height)))
    )
    parts = [_frame(x_axis, y_axis, x_label)]
    for number, (name, *points) in enumerate(clouds):
        path = "".join(
            f"M{_x(x_axis, x):g},{_y(y_axis, y):g}h0" for x, y in zip(*points, strict=True)
        )
        said = f"<title>{escape(name)}</title>"
        parts.append(f'<path class="cloud {_colour(number)}" d="{path}">{said}</path>')
    return _figure(title, parts, [])


def render_shares(
    title: str, rows: Sequence[tuple[str, Sequence[float]]], columns: Sequence[str], *, x_label: str
) -> str:
    """Draw a table of shares as a heat map, where a larger share is darker.

    Args:
        title: Title above the plot.
        rows: Name of each row, and its shares from 0 to 1. Only some names are shown if there are
            many.
        columns: Names of the columns. Only some are shown if there are many.
        x_label: Quantity along the columns.
    """
    left, floor = 2 * _LEFT, _HEIGHT - _BOTTOM
    width, height = (_WIDTH - left - _RIGHT) / len(columns), (floor - _TOP) / len(rows)
    darkest = max(share for _, shares in rows for share in shares) or 1
    every = -(-len(columns) // 8)
    parts = []
    for number, (name, shares) in enumerate(rows):
        y = _TOP + number * height
        if number % -(-len(rows) // 16) == 0:
            place = f'x="{left - 8}" y="{y + height / 2 + 4:.1f}"'
            parts.append(f'<text class="tick y" {place}>{escape(name)}</text>')
        for column, (of, share) in enumerate(zip(columns, shares, strict=True)):
            parts.append(
                f'<rect class="bar" x="{left + column * width:.1f}" y="{y:.1f}" '
                f'width="{width:.1f}" height="{height:.1f}" '
                f'fill-opacity="{share / darkest:.3f}"><title>'
                f"{escape(name)}, {escape(of)}: {100 * share:.1f} %</title></rect>"
            )
    for column in range(0, len(columns), every):
        place = f'x="{left + (column + 0.5) * width:.1f}" y="{floor + 17}"'
        parts.append(f'<text class="tick x" {place}>{escape(columns[column])}</text>')
    middle = (left + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="tick x" x="{middle}" y="{_HEIGHT - 5}">{escape(x_label)}</text>')
    return _figure(title, parts, [])


def render_sparkbars(counts: Sequence[int]) -> str:
    """Draw a histogram the size of a word."""
    top = max(counts, default=0) or 1
    width = 120 / max(len(counts), 1)
    bars = "".join(
        f'<rect class="bar" x="{i * width:.1f}" y="{28 - 28 * count / top:.1f}" '
        f'width="{width - 1:.1f}" height="{28 * count / top:.1f}"/>'
        for i, count in enumerate(counts)
    )
    return f'<svg class="spark" viewBox="0 0 120 28" aria-hidden="true">{bars}</svg>'


def short_number(value: float) -> str:
    """Format a number for an axis: 3M, 250k, 0.02."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    if value and abs(value) < 1e-3:  # noqa: PLR2004
        mantissa, _, exponent = f"{value:.2g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return f"{value:.3g}"


def _thin(line: Line) -> Iterator[list[_Point]]:
    """Yield the pieces of the line between gaps, reduced to about `_BUCKETS` buckets in all."""
    pieces: list[list[tuple[float, float]]] = [[]]
    gaps = line.gaps or [False] * len(line.x)
    for x, y, gap in zip(line.x, line.y, gaps, strict=True):
        if gap and pieces[-1]:
            pieces.append([])
        if math.isfinite(x) and math.isfinite(y):
            pieces[-1].append((x, y))
    size = -(-sum(map(len, pieces)) // _BUCKETS) or 1
    for piece in filter(None, pieces):
        stretches = [piece[start : start + size] for start in range(0, len(piece), size)]
        yield [_summary(*zip(*stretch, strict=True)) for stretch in stretches]


def _summary(xs: Sequence[float], ys: Sequence[float]) -> _Point:
    return sum(xs) / len(xs), sum(ys) / len(ys), min(ys), max(ys)


def _drawn_line(said: str, points: list[_Point], x_axis: _Axis, y_axis: _Axis, number: int) -> str:
    def path(column: int, order: list[_Point]) -> str:
        return " ".join(f"{_x(x_axis, p[0]):.1f},{_y(y_axis, p[column]):.1f}" for p in order)

    title, colour = f"<title>{escape(said)}</title>", _colour(number)
    if len(points) == 1:
        x, y = path(1, points).split(",")
        return f'<circle class="dot {colour}" cx="{x}" cy="{y}" r="3.5">{title}</circle>'
    band = f'<polygon class="band {colour}" points="{path(3, points)} {path(2, points[::-1])}"/>'
    return f'{band}<polyline class="line {colour}" points="{path(1, points)}">{title}</polyline>'


def _frame(x_axis: _Axis, y_axis: _Axis, x_label: str, *, exponents: bool = False) -> str:
    floor = _HEIGHT - _BOTTOM
    parts = []
    for tick in y_axis.ticks:
        y = _y(y_axis, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text class="tick y" x="{_LEFT - 8}" y="{y + 4}">{short_number(tick)}</text>'
        )
    for tick in x_axis.ticks:
        x = _x(x_axis, tick)
        label = (
            f'10<tspan dy="-4" class="power">{tick:.0f}</tspan>'
            if exponents
            else short_number(tick)
        )
        parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{floor}" y2="{floor + 4}"/>')
        parts.append(f'<text class="tick x" x="{x}" y="{floor + 17}">{label}</text>')
    parts.append(
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{floor}" y2="{floor}"/>'
    )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="tick x" x="{middle}" y="{_HEIGHT - 5}">{escape(x_label)}</text>')
    return "".join(parts)


def _figure(title: str, parts: Sequence[str], legend: Sequence[str]) -> str:
    keys = f'<span class="keys">{"".join(legend)}</span>' if legend else ""
    return (
        f"<figure><figcaption>{escape(title)}{keys}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _colour(number: int) -> str:
    return f"c{number % PALETTE}"


def _keys(names: Sequence[str]) -> list[str]:
    return [f'<span class="key {_colour(n)}">{escape(name)}</span>' for n, name in enumerate(names)]


def _linear(low: float, high: float, about: int) -> _Axis:
    if not high > low:
        low, high = (low - 0.5 * abs(low), high + 0.5 * abs(high)) if low else (0.0, 1.0)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min((1, 2, 5, 10), key=lambda m: abs(m * power - rough))
    count = math.floor(high / step + 1e-9) - math.ceil(low / step - 1e-9) + 1
    ticks = [(math.ceil(low / step - 1e-9) + i) * step for i in range(count)]
    return _Axis(low, high, ticks, lambda v: (v - low) / (high - low))


def _exponents(low: float, high: float) -> _Axis:
    """Build an axis of decimal logarithms, with a tick at each integer."""
    if math.floor(high) == math.ceil(low) - 1 or not high > low:  # no integer lies between
        low, high = math.floor(low), math.floor(low) + 1
    ticks = [float(t) for t in range(math.ceil(low), math.floor(high) + 1)]
    return _Axis(low, high, ticks, lambda v: (v - low) / (high - low))


def _padded(values: Sequence[float], from_zero: bool = False) -> _Axis:  # noqa: FBT001, FBT002
    low, high = min(values), max(values)
    # a flat line is drawn in the middle, but a share that is always zero at the bottom
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1e-2
    return _linear(0.0 if from_zero or 0 <= low < pad else low - pad, high + pad, 4)


def _log(low: float, high: float) -> _Axis:
    low, high = low / 1.15, high * 1.15
    bottom, span = math.log10(low), math.log10(high) - math.log10(low)
    digits = (1, 2, 5) if span < 2.5 else (1,)  # noqa: PLR2004
    decades = range(math.floor(bottom), math.ceil(bottom + span) + 1)
    ticks = [digit * 10.0**decade for decade in decades for digit in digits]
    within = [tick for tick in ticks if low <= tick <= high]
    return _Axis(low, high, within, lambda v: (math.log10(v) - bottom) / span)


def _x(axis: _Axis, value: float) -> float:
    return round(_LEFT + axis.place(value) * (_WIDTH - _LEFT - _RIGHT), 1)


def _y(axis: _Axis, value: float) -> float:
    return round(_HEIGHT - _BOTTOM - axis.place(value) * (_HEIGHT - _TOP - _BOTTOM), 1)
