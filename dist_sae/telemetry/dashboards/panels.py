"""Dashboards and panels as plain values, independent of Grafana's SDK."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from dist_sae.telemetry.dashboards.queries import Query, now
from dist_sae.telemetry.metrics import TABLE

Unit = Literal["count", "share", "seconds", "bytes", "bytes/s", "rows/s", "per second"]
_UNITS: dict[str, Unit] = {"share": "share", "seconds": "seconds", "bytes": "bytes"}
Shape = Literal["graph", "stack", "number", "table"]


class Panel(NamedTuple):
    """One panel: some series and how to draw them."""

    shape: Shape
    title: str
    unit: Unit
    queries: tuple[Query, ...]
    description: str = ""
    """How to read the panel."""
    limits: tuple[float, ...] = ()
    """Thresholds for yellow, then red. A single one is for red."""
    width: int | None = None
    """Width in 24ths; None for the default of its shape."""


class Page(NamedTuple):
    """One dashboard."""

    name: str
    title: str
    description: str
    """The dashboard's description."""
    sections: Mapping[str, tuple[Panel, ...]]
    """By question, the panels that answer it."""
    ranks: str = ""
    """Role whose ranks the user can choose, if any."""

    @property
    def uid(self) -> str:
        """Grafana's identifier of the dashboard, used in links to it."""
        return f"dist-sae-{self.name}"


def graph(
    title: str,
    unit: Unit,
    *queries: Query,
    description: str = "",
    limits: tuple[float, ...] = (),
    width: int | None = None,
) -> Panel:
    """Create a panel with lines over time."""
    return Panel("graph", title, unit, queries, description, limits, width)


def stack(title: str, unit: Unit, query: Query, description: str = "") -> Panel:
    """Create a panel with stacked areas, which show the parts of a whole for one run."""
    return Panel(
        "stack",
        title,
        unit,
        (query,),
        f"{description} Select a single run, because several would be stacked.",
    )


def number(
    title: str,
    unit: Unit,
    query: Query,
    description: str = "",
    limits: tuple[float, ...] = (),
    width: int | None = None,
    of: Query | None = None,
) -> Panel:
    """Create a panel with the last value as a large number; with `of`, also the expected value."""
    queries = (query.named("running"), of.named("expected")) if of else (query,)
    return Panel("number", title, unit, queries, description, limits, width)


def gauge(panel: Callable[..., Panel], name: str, by: str = "run", **settings: Any) -> Panel:
    """Create a panel of one gauge, with the title and unit from the metric table.

    Args:
        panel: `graph` or `number`.
        name: Name of the metric.
        by: Labels that distinguish the gauge's series.
        settings: Other arguments of `panel`.
    """
    metric = TABLE[name]
    return panel(metric.title, _UNITS.get(metric.unit, "count"), now(name, by), **settings)


def table(title: str, query: Query, description: str = "") -> Panel:
    """Create a table of the current series, with their labels in columns."""
    return Panel("table", title, "count", (query,), description)
