"""Progress of production, for telemetry and the terminal."""

import time
from collections import Counter
from typing import Any

from dist_sae import logs
from dist_sae.data.plan import Plan
from dist_sae.data.shard import UnitManifest
from dist_sae.data.work_queue import WorkQueue
from dist_sae.telemetry.exporter import Telemetry


class Progress:
    """Counts the rows of finished units, and the rows so far of units in progress."""

    def __init__(self, plan: Plan, queue: WorkQueue, telemetry: Telemetry) -> None:
        self.written = Counter(units=0, rows=0)
        """Numbers of units and rows that this producer has written."""
        self._rows = plan.rows_of_units
        self._queue = queue
        self._telemetry = telemetry
        self._in_progress: dict[int, int] = {}
        self._pace = logs.RateLimitedProgress("produce")
        self._began = 0.0

    def computed(self, unit: int, n_rows: int, tokenize_seconds: float) -> None:
        """Report how many rows of a unit the model has computed, if a report is due.

        Args:
            tokenize_seconds: Time that tokenizing the unit's text took.
        """
        if unit not in self._in_progress:
            self._began = time.monotonic()
        self._in_progress[unit] = min(n_rows, self._rows[unit])
        if self._pace.take_turn():
            seconds = time.monotonic() - self._began
            self.report(
                **({"rows_per_second": round(n_rows / seconds)} if seconds > 1 else {}),
                busiest="tokenize" if tokenize_seconds > seconds else "forward",
                doing="",
            )

    def finished(self, manifest: UnitManifest) -> None:
        """Count a unit that this producer has stored."""
        telemetry = self._telemetry
        self.written.update(units=1, rows=manifest.rows)
        telemetry.life.progressed()
        telemetry.add("dist_sae_produce_units_total", 1)
        telemetry.add("dist_sae_produce_rows_total", manifest.rows)
        telemetry.add("dist_sae_produce_refused_documents_total", manifest.refused)
        for reason, count in manifest.excluded.items():
            telemetry.add("dist_sae_produce_excluded_rows_total", count, reason=reason)
        for stage, seconds in manifest.seconds.items():
            telemetry.add("dist_sae_produce_seconds_total", seconds, stage=stage)
        telemetry.set("dist_sae_produce_ready_units", self._queue.done())
        busiest = max(manifest.seconds, key=lambda stage: manifest.seconds[stage])
        self.report(
            rows=manifest.rows,
            rows_per_second=round(manifest.rows / max(manifest.seconds[busiest], 1e-9)),
            busiest=busiest,
        )

    def report(self, **numbers: Any) -> None:
        """Report the progress now."""
        left = self._queue.left()
        self._in_progress = {unit: rows for unit, rows in self._in_progress.items() if unit in left}
        total = sum(self._rows)
        logs.progress(
            "produce",
            total - sum(self._rows[unit] for unit in left),
            total,
            at_hand=sum(self._in_progress.values()),
            units=self._queue.done(),
            **numbers,
        )
