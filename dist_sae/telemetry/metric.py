"""The columns of the metric table and the values of labels. Imports no torch, no client library."""

from typing import Literal, NamedTuple

EVERY_SERIES = ("run", "role", "rank")
"""Labels that every series has."""

SHORT_LIVED = ("plan", "evaluate", "export", "report")
"""Programs that end too soon to be scraped: they push (`telemetry.pushgateway_url`)."""
ROLES = ("produce", "train", "index", *SHORT_LIVED)
"""The programs that have metrics."""

OTHERS = "others"
PHASES = ("wait", "ranks", "begin", "forward", "backward", "optimiser", "save", "rest", OTHERS)
"""Phases of training, which add up to its time. `wait`: for data, on the rank that waits longest;
`ranks`: in collectives, for slower ranks and for the network; `begin`: before the first step;
`others`: in steps of other jobs of a sweep."""
STANDING = ("wait", "begin", "save", OTHERS)
"""Phases in which no step is made."""
WORKING = tuple(phase for phase in PHASES if phase not in (*STANDING, "ranks"))
"""Phases in which a rank works; in the others it waits, or stores."""
STAGES = ("tokenize", "forward", "pack", "store")
"""Stages of a producer, in the order of the work; they overlap."""
QUANTILES = ("0.05", "0.25", "0.5", "0.75", "0.95")
"""Quantiles of rows."""
NEVER = "never"
DENSITIES = (NEVER, *(f"{-7 + i / 2:.1f}" for i in range(14)))
"""Buckets of latents by log10 of the share of rows that they fire on: each bucket's lower edge.

Half a decade wide, up to 0 (every row). The first numbered bucket includes rarer latents.
"""
RARE = 1e-5
"""Latents that fire on a smaller share of rows count as rarely firing."""
STORE_ERRORS = ("AccessError", "StoreError", "StoreFullError", "UnavailableError")

_EXPORTERS = {
    "process_device": ("produce", "train", "index", "evaluate", "report"),
    "rank": ("produce", "train", "index"),
    "job": SHORT_LIVED,
    "checkpoint": ("train",),
    **{role: (role,) for role in ("plan", "produce", "train", "index", "evaluate")},
}
"""Programs that export the metrics whose names begin so; every program exports the others."""
_MEASURED = (
    *("seconds", "bytes", "rows", "tokens", "documents", "units", "requests", "steps", "share"),
    *("latents", "experts", "ranks", "batches", "buckets", "entries"),
)
_UNITS = {
    **{unit: unit for unit in _MEASURED},
    "rows_per_second": "rows/second",
    "step": "steps",
    "stalls": "steps",
    "takeovers": "items",
    "retries": "requests",
    "errors": "operations",
    "damaged": "checkpoints",
    "recovered": "share",
}
"""Units of metrics whose names end so, without `_total`; the others have none."""

View = Literal["progress", "status", "card", "detail"]
"""Where numbers are listed: progress of a run, `dist-sae status`, the report's cards and table."""


class Metric(NamedTuple):
    """One row of the table.

    The name says which program exports it, its kind (counters end in `_total`) and its unit.
    Whatever shows metrics takes name, title, unit and format from here.
    """

    name: str
    help: str
    title: str = ""
    """Heading of a panel, chart or card. Metrics without one are not recorded."""
    recorded_as: str = ""
    """Its key in records, where that is not the name without its prefix."""
    text: str = ""
    """Format of its value among others in a line: `fvu {:.3f}`."""
    views: tuple[View, ...] = ()
    """Lists that it is part of."""
    labels: tuple[str, ...] = ()
    """Its own labels; every series also has `EVERY_SERIES`."""
    values: tuple[str, ...] = ()
    """Values of its one label, if they are known; a counter starts with all of them at 0."""
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets."""

    @property
    def kind(self) -> Literal["counter", "gauge", "histogram"]:
        """Prometheus' type of the metric."""
        if self.buckets:
            return "histogram"
        return "counter" if self.name.endswith("_total") else "gauge"

    @property
    def unit(self) -> str:
        """Unit of its values; `1` where it has none."""
        name = self.name.removesuffix("_total")
        return next((unit for end, unit in _UNITS.items() if name.endswith(f"_{end}")), "1")

    @property
    def roles(self) -> tuple[str, ...]:
        """The programs that export it."""
        name = self.name.removeprefix("dist_sae_")
        return next((of for start, of in _EXPORTERS.items() if name.startswith(f"{start}_")), ROLES)

    @property
    def short(self) -> str:
        """Its key in records: history, TensorBoard, results, progress. Empty: in none."""
        name = self.name.removeprefix("dist_sae_").removeprefix(f"{self.roles[0]}_")
        return (self.recorded_as or name) if self.title else ""
