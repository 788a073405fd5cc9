"""Columns of the metric table, and values of labels. Imports no torch and no prometheus_client."""

from typing import Literal, NamedTuple

EVERY_SERIES = ("run", "role", "rank")
"""Labels that every series has."""

SHORT_LIVED = ("plan", "evaluate", "export", "report")
"""Programs that end too soon to be scraped, so they push (`telemetry.pushgateway_url`)."""
ROLES = ("produce", "train", "index", *SHORT_LIVED)
"""The programs that have metrics."""

OTHERS = "others"
PHASES = ("wait", "ranks", "begin", "forward", "backward", "optimiser", "save", "rest", OTHERS)
"""Phases of training, which add up to its total time.

- `wait`: waiting for data, on the rank that waits longest
- `ranks`: in collectives, waiting for slower ranks and the network
- `begin`: before the first step
- `others`: in steps of other jobs of a sweep
"""
NON_STEP_PHASES = ("wait", "begin", "save", OTHERS)
"""Phases in which no step of the job runs."""
COMPUTE_PHASES = tuple(phase for phase in PHASES if phase not in (*NON_STEP_PHASES, "ranks"))
"""Phases in which a rank works. In the others it waits or saves."""
STAGES = ("tokenize", "forward", "pack", "store")
"""Stages of a producer, in the order of the work. Stages overlap in time."""
QUANTILES = ("0.05", "0.25", "0.5", "0.75", "0.95")
"""Quantiles over the rows of a batch."""
NEVER = "never"
DENSITIES = (NEVER, *(f"{-7 + i / 2:.1f}" for i in range(14)))
"""Buckets of latents by log10 of the share of rows that they fire on, named by their lower edges.

Buckets are half a decade wide, up to 0 (every row). The first numbered one includes rarer latents.
"""
RARE = 1e-5
"""Latents that fire on a smaller share of rows than this count as rarely firing."""
STORE_ERRORS = ("AccessError", "StoreError", "StoreFullError", "UnavailableError")

_EXPORTERS = {
    "process_device": ("produce", "train", "index", "evaluate", "report"),
    "rank": ("produce", "train", "index"),
    "job": SHORT_LIVED,
    "checkpoint": ("train",),
    **{role: (role,) for role in ("plan", "produce", "train", "index", "evaluate")},
}
"""Programs that export metrics, by prefix of the name. Every program exports all other metrics."""
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
"""Units of metrics, by suffix of the name without `_total`. All other metrics have none."""

View = Literal["progress", "status", "card", "detail"]
"""Where metrics are shown: a run's progress, `dist-sae status`, the report's cards or its table."""


class Metric(NamedTuple):
    """One row of the table.

    The name determines which program exports the metric, its kind (counters end in `_total`) and
    its unit. Everything that displays metrics takes name, title, unit and format from here.
    """

    name: str
    help: str
    title: str = ""
    """Heading of a panel, chart or card. Metrics without one are not recorded."""
    recorded_as: str = ""
    """The metric's key in records, if it differs from the name without its prefix."""
    text: str = ""
    """Format of the value in a line with other metrics: `fvu {:.3f}`."""
    views: tuple[View, ...] = ()
    """Views that show the metric."""
    labels: tuple[str, ...] = ()
    """The metric's own labels. Every series also has `EVERY_SERIES`."""
    values: tuple[str, ...] = ()
    """Values of the metric's only label, if known. A counter starts at 0 for each of them."""
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
        """Unit of the values; `1` if there is none."""
        name = self.name.removesuffix("_total")
        return next((unit for end, unit in _UNITS.items() if name.endswith(f"_{end}")), "1")

    @property
    def roles(self) -> tuple[str, ...]:
        """The programs that export the metric."""
        name = self.name.removeprefix("dist_sae_")
        return next((of for start, of in _EXPORTERS.items() if name.startswith(f"{start}_")), ROLES)

    @property
    def short(self) -> str:
        """The key in records: history, TensorBoard, results, progress. Empty if not recorded."""
        name = self.name.removeprefix("dist_sae_").removeprefix(f"{self.roles[0]}_")
        return (self.recorded_as or name) if self.title else ""
