"""Dashboards as plain values."""

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
    says: str = ""
    """How to read it."""
    limits: tuple[float, ...] = ()
    """Thresholds for yellow, then red; a single one is for red."""
    width: int | None = None
    """Width in 24ths; None for the default of its shape."""


class Page(NamedTuple):
    """One dashboard."""

    name: str
    title: str
    says: str
    """The question that it answers."""
    sections: Mapping[str, tuple[Panel, ...]]
    """Questions, and the panels that answer each."""
    ranks: str = ""
    """Role whose ranks can be chosen, if any."""

    @property
    def uid(self) -> str:
        """Grafana's identifier, which other dashboards link to."""
        return f"dist-sae-{self.name}"


def graph(
    title: str,
    unit: Unit,
    *queries: Query,
    says: str = "",
    limits: tuple[float, ...] = (),
    width: int | None = None,
) -> Panel:
    """Lines over time."""
    return Panel("graph", title, unit, queries, says, limits, width)


def stack(title: str, unit: Unit, query: Query, says: str = "") -> Panel:
    """Stacked areas: the parts of a whole, of one run."""
    return Panel(
        "stack", title, unit, (query,), f"{says} Choose one run: several would be piled up."
    )


def number(
    title: str,
    unit: Unit,
    query: Query,
    says: str = "",
    limits: tuple[float, ...] = (),
    width: int | None = None,
    of: Query | None = None,
) -> Panel:
    """The last value as a large number, and beside it of how many."""
    queries = (query.named("there"), of.named("wanted")) if of else (query,)
    return Panel("number", title, unit, queries, says, limits, width)


def gauge(panel: Callable[..., Panel], name: str, by: str = "run", **settings: Any) -> Panel:
    """A panel of one gauge, with the title and the unit of the metric table.

    Args:
        panel: `graph` or `number`.
        name: The metric.
        by: Labels that tell its series apart.
        settings: As `panel` takes them.
    """
    metric = TABLE[name]
    return panel(metric.title, _UNITS.get(metric.unit, "count"), now(name, by), **settings)


def table(title: str, query: Query, says: str = "") -> Panel:
    """The current series, their labels in columns."""
    return Panel("table", title, "count", (query,), says)
