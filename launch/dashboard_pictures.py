"""Draw the dashboards with data from a Prometheus server: monitoring/pictures/*.png.

Usage: launch/dashboard_pictures.py http://127.0.0.1:9090 [MINUTES [END [DASHBOARD ...]]]

END is in seconds since 1970; default: now. Without names, draws all dashboards. Needs matplotlib.

This does not use Grafana, because it is not available as a Python or Debian package. It uses the
same JSON, queries and layout.
"""

import json
import re
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

MONITORING = Path(__file__).parent.parent / "monitoring"
CELL = (0.54, 0.36)  # width of a column and height of a row of the grid, in inches
POINTS = 240
GREY = "#5f6670"
SIZES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


class Series(NamedTuple):
    """A series that a panel draws as a line."""

    name: str
    labels: dict[str, str]
    times: Any
    values: Any


class Asker(NamedTuple):
    """A Prometheus server and the time range to show."""

    url: str
    start: float
    end: float

    def minutes(self, times: Any) -> Any:
        """Convert times to minutes relative to the end: negative, 0 at the end."""
        return (times - self.end) / 60

    def series(self, target: dict[str, Any]) -> list[Series]:
        """Query the series of a target, as Grafana does if every variable is set to All."""
        seconds = self.end - self.start
        step = seconds / POINTS
        expression = re.sub(r'"\$(namespace|run|rank)"', '".*"', target["expr"])
        expression = expression.replace("$__rate_interval", "30s")
        expression = expression.replace("$__range", f"{seconds:.0f}s")
        asked = {"query": expression, "start": self.start, "end": self.end, "step": step}
        url = f"{self.url}/api/v1/query_range?{urllib.parse.urlencode(asked)}"
        with urllib.request.urlopen(url) as answer:
            result = json.load(answer)["data"]["result"]
        found = []
        for line in result:
            times, values = np.array(line["values"], dtype=float).T
            labels = line["metric"]
            found.append(Series(_legend(target["legendFormat"], labels), labels, times, values))
        return sorted(found, key=lambda series: [_number(word) for word in series.name.split()])


def _legend(form: str, labels: dict[str, str]) -> str:
    """Fill labels into a legend format. Labels that the series lacks are left out."""
    return " ".join(re.sub(r"{{(\w+)}}", lambda word: labels.get(word[1], ""), form).split())


def _number(word: str) -> tuple[float, str]:
    try:
        return float(word), word
    except ValueError:
        return float("-inf"), word


def say(value: float, unit: str) -> str:
    """Format a value as Grafana does."""
    if not np.isfinite(value):
        return "-"
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s" and value >= 60:
        return f"{value / 3600:.3g} h" if value >= 3600 else f"{value / 60:.3g} min"
    suffix = {"s": " s", "bytes": "B", "Bps": "B/s", "rowsps": " rows/s", "cps": "/s"}.get(unit, "")
    if unit == "s" and value < 1:
        return f"{1000 * value:.3g} ms"
    for size, letter in SIZES:
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}{suffix.strip()}"
    return f"{value:.3g}{suffix}"


def draw(dashboard: dict[str, Any], asker: Asker, picture: Path) -> None:
    """Draw a dashboard as a PNG with few colors, to keep the file small."""
    panels = dashboard["panels"]
    rows = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in panels) + 2
    figure = plt.figure(figsize=(24 * CELL[0], rows * CELL[1]), facecolor="#f2f4f6")
    figure.text(0.008, 1 - 0.9 / rows, dashboard["title"], size=15, weight="bold", va="center")
    question = dashboard["description"].partition(" Generated")[0]
    figure.text(0.992, 1 - 0.9 / rows, question, size=10, color=GREY, va="center", ha="right")
    for panel in panels:
        place = panel["gridPos"]
        x, y = place["x"] / 24, 1 - (place["y"] + 2 + place["h"]) / rows
        width, height = place["w"] / 24, place["h"] / rows
        if panel["type"] == "row":
            figure.text(
                x + 0.008, y + height / 2, panel["title"], size=11, weight="bold", va="center"
            )
            continue
        card = figure.add_axes((x + 0.003, y + 0.12 / rows, width - 0.006, height - 0.24 / rows))
        card.set(xticks=[], yticks=[], facecolor="white")
        for spine in card.spines.values():
            spine.set_color("#dcdfe2")
        figure.text(x + 0.01, y + height - 0.75 / rows, panel["title"], size=8.5, va="center")
        unit = panel["fieldConfig"]["defaults"].get("unit", "short")
        series = [line for target in panel["targets"] for line in asker.series(target)]
        if panel["type"] == "table":
            _draw_table(card, [line for line in series if line.times[-1] == asker.end])
        elif not series:
            card.text(0.5, 0.45, "none", size=11, color=GREY, ha="center", va="center")
        elif panel["type"] == "stat":
            _draw_number(card, series, unit, panel)
        else:
            inner = (x + 0.06, y + 2.3 / rows, width - 0.08, height - 3.7 / rows)
            _draw_graph(figure.add_axes(inner), series, unit, panel, asker)
    figure.savefig(picture, dpi=84)
    plt.close(figure)
    Image.open(picture).convert("RGB").quantize(256).save(picture, optimize=True)


def _draw_table(card: Axes, series: Sequence[Series]) -> None:
    alive = [s for s in series if s.times[-1] >= max(t.times[-1] for t in series)]
    lines = [
        "     ".join(f"{k}: {v}" for k, v in s.labels.items() if k != "__name__") for s in alive
    ]
    for i, line in enumerate(lines or ["none"]):
        card.text(0.01, 0.7 - 0.16 * i, line, size=8.5, va="center")


def _draw_number(card: Axes, series: Sequence[Series], unit: str, panel: dict[str, Any]) -> None:
    steps = panel["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", [])
    coloured = panel["options"]["colorMode"] == "value"
    for i, line in enumerate(series):
        value = line.values[-1]
        passed = [s["color"] for s in steps if s["value"] is None or value >= s["value"]]
        shade = {"green": "#1d8a4b", "yellow": "#c28a00", "red": "#c4162a"}
        colour = shade[passed[-1]] if coloured else "#23272b"
        y = 0.4 if len(series) == 1 else 0.6 - 0.36 * i
        size = 19 if len(series) == 1 else 13
        card.text(0.5, y, say(value, unit), size=size, color=colour, ha="center", va="center")
        if len(series) > 1:
            card.text(0.5, y - 0.16, line.name, size=7, color=GREY, ha="center", va="center")


def _draw_graph(
    axes: Axes, series: Sequence[Series], unit: str, panel: dict[str, Any], asker: Asker
) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    colours = plt.get_cmap("tab10" if len(series) <= 10 else "turbo")
    shades = [colours(i if len(series) <= 10 else i / len(series)) for i in range(len(series))]
    if defaults.get("custom", {}).get("stacking", {}).get("mode") == "normal":
        times = np.unique(np.concatenate([s.times for s in series]))
        heights = [np.interp(times, s.times, s.values, left=0, right=0) for s in series]
        axes.stackplot(asker.minutes(times), heights, colors=shades, alpha=0.75)
    else:
        for line, shade in zip(series, shades, strict=True):
            axes.plot(asker.minutes(line.times), line.values, color=shade, linewidth=1.2)
    for step in defaults.get("thresholds", {}).get("steps", []):
        low, high = axes.get_ylim()
        if step["value"] is not None and low <= step["value"] <= high:
            axes.axhline(step["value"], color=step["color"], linestyle="--", linewidth=0.8)
    axes.set_xlim(asker.minutes(asker.start), 0)
    if all((line.values >= 0).all() for line in series):
        top = max(axes.get_ylim()[1], 1e-9)
        axes.set_ylim(-0.02 * top, top)  # so that lines at 0 are visible
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} min"))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: say(value, unit)))
    axes.tick_params(labelsize=7, colors=GREY, length=0)
    axes.grid(color="#eceef0", linewidth=0.7)
    axes.set_frame_on(False)
    _draw_legend(axes, series, shades, panel["gridPos"]["w"])


def _draw_legend(axes: Axes, series: Sequence[Series], shades: Sequence[Any], width: int) -> None:
    """Draw a legend with the largest series, as many as fit in three lines."""
    longest = max(len(line.name) for line in series)
    columns = max(1, int((width * CELL[0] - 0.6) / (0.3 + 0.052 * longest)))
    largest = sorted(range(len(series)), key=lambda i: -series[i].values.mean())
    chosen = sorted(largest[: 3 * columns])
    names = [series[i].name for i in chosen]
    if len(names) < len(series):
        names[-1] += f"  (of {len(series)})"
    axes.legend(
        [Line2D([], [], color=shades[i], linewidth=3) for i in chosen],
        names,
        loc="upper left",
        bbox_to_anchor=(-0.02, -0.12),
        ncols=min(len(names), columns),
        fontsize=6.5,
        frameon=False,
        handlelength=0.9,
        columnspacing=0.9,
        handletextpad=0.4,
        borderpad=0,
    )


def main() -> None:
    url, minutes = sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 15.0
    end = float(sys.argv[3]) if len(sys.argv) > 3 else time.time()
    asker = Asker(url, end - 60 * minutes, end)
    folder = MONITORING / "pictures"
    folder.mkdir(exist_ok=True)
    for path in sorted((MONITORING / "dashboards").glob("*.json")):
        if path.stem not in (sys.argv[4:] or [path.stem]):
            continue
        picture = folder / f"{path.stem}.png"
        draw(json.loads(path.read_text()), asker, picture)
        print(picture, f"{picture.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
