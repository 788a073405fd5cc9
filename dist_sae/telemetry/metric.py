"""What a metric is, and what its labels can be. Imports no torch and no client library."""

from typing import Literal, NamedTuple

EVERY_SERIES = ("run", "role", "rank")
"""Labels of every series."""

SHORT_LIVED = ("plan", "evaluate", "export", "report")
"""Programs that nobody can scrape: they push (`telemetry.pushgateway_url`)."""
ROLES = ("produce", "train", *SHORT_LIVED)
"""The programs that have metrics."""

PHASES = ("wait", "ranks", "begin", "forward", "backward", "optimiser", "save", "rest")
"""Of training: they add up to its time. `wait` is for data, of the rank that waits longest; `ranks`
for slower ranks, and on CPUs the exchange with all; `begin` comes before the first step."""
STANDING = ("wait", "begin", "save")
"""The phases in which no step is made."""
STAGES = ("tokenize", "forward", "pack", "store")
"""Of a producer, in the order of the work; they overlap."""
QUANTILES = ("0.05", "0.25", "0.5", "0.75", "0.95")
"""Of rows."""
NEVER = "never"
DENSITIES = (NEVER, *(f"{-7 + i / 2:.1f}" for i in range(14)))
"""Buckets of latents: the log10 of the share of rows that they fire on is at least this.

The first numbered one has the rarer ones too. Half a decade wide, to 0, every row.
"""
RARE = 1e-5
"""A latent that fires on a smaller share of rows fires rarely."""
STORE_ERRORS = (
    "AccessError",
    "StoreError",
    "StoreFullError",
    "UnavailableError",
)


class Metric(NamedTuple):
    """One row of the table. Names carry the unit; counters end in `_total`."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    """`1` where it has none."""
    roles: tuple[str, ...]
    """The programs that export it."""
    help: str
    labels: tuple[str, ...] = ()
    """Beside those of every series."""
    values: tuple[str, ...] = ()
    """What its one label can be, where that is known; a counter begins with all of them at 0."""
    buckets: tuple[float, ...] = ()
    """Of a histogram; the client's own if empty."""
