"""Shows a local run's progress: bars in a terminal of 80 columns, otherwise a line at intervals."""

import re
import threading
import time
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from dist_sae.telemetry.metrics import listed
from dist_sae.training.limits import describe_limit

PLAIN_EVERY_SECONDS = 10.0
"""Time between lines when the output is not a terminal."""


class ProgressView:
    """Shows the progress that processes report (`logs.progress`).

    Args:
        console: Where to print; stderr by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description:7}", table_column=Column(no_wrap=True, min_width=7)),
            BarColumn(bar_width=10),
            TextColumn("{task.percentage:3.0f}%", table_column=Column(no_wrap=True, min_width=4)),
            TextColumn("{task.fields[left]:>7}", table_column=Column(no_wrap=True, min_width=7)),
            TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True)),
        )
        self._limit = Text()
        self._live = Live(self, console=self._console)
        self._tasks: dict[str, TaskID] = {}
        self._roles: dict[str, _Role] = {}
        self._warned: set[str] = set()
        self._warning = threading.Lock()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._limit.truncate(0)  # a finished run has no limit
        self._live.stop()

    def __rich__(self) -> Group:
        return Group(self._progress, self._limit)

    def begin(self, name: str) -> None:
        """Announce a part of the run that reports no progress. Show all earlier parts as done."""
        self._finish(*self._tasks)
        self._limit.truncate(0)
        self._console.print(f"{name} ...", highlight=False)

    def show(self, process: str, record: Mapping[str, Any]) -> None:
        """Show a progress record that a process reported."""
        name = record["role"]
        role = self._roles.setdefault(name, _Role(record["done"]))
        role.take(process, record)
        if "said" in record:
            self._console.print(f"{name}: {record['said']}", highlight=False, soft_wrap=True)
            return
        limit = f"limit: {self._describe_limit()}"
        if self._console.is_terminal:
            if name not in self._tasks:
                self._finish("plan")  # it ends before all others, without reporting that it is done
                self._tasks[name] = self._progress.add_task(
                    name, total=role.total, completed=round(role.done), note="", left=""
                )
            self._progress.update(
                self._tasks[name],
                completed=role.done,
                total=role.total,
                note=role.describe(),
                left="-:--:--" if role.left is None else str(role.left),
            )
            if name.startswith(("produce", "train")):
                self._limit.plain = limit
            else:
                self._limit.truncate(0)
        elif role.is_due():
            left = "" if role.left is None else f"  {role.left} left"
            line = f"{name} {role.amount()}{left}  {role.describe()}"
            if name.startswith("train") and role.done < role.total:
                line += f"  {limit}"
            self._console.print(line, highlight=False, soft_wrap=True)

    def _finish(self, *names: str) -> None:
        """Show parts of the run as done."""
        for name in names:
            if name in self._tasks and (role := self._roles[name]).total:
                self._progress.update(
                    self._tasks[name], completed=role.total, note="", left="0:00:00"
                )

    def warn(self, level: str, text: str) -> None:
        """Show a warning once, even if many processes log it with different numbers."""
        kind = re.sub(r"\d+", "", text)
        with self._warning:
            if kind in self._warned:
                return
            self._warned.add(kind)
        line = f"{level.lower()}: {text}"
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _describe_limit(self) -> str:
        trainings = [role for name, role in self._roles.items() if name.startswith("train")]
        producing = self._roles.get("produce")
        # a sweep's jobs report under their own names, but wait for data together, as `train`
        numbers = next((role.numbers for role in trainings if "phases" in role.numbers), {})
        waits = any(role.waiting for role in trainings)
        phases = {"wait": 1.0} if waits else numbers.get("phases", {})
        return describe_limit(
            phases,
            numbers.get("product_share"),
            producing.slowest_stage if producing else None,
            numbers.get("slow"),
            all_produced=producing is not None and producing.done == producing.total,
        )


class _Role:
    """Progress of the processes of one role."""

    def __init__(self, done: float) -> None:
        self.done = done
        self.total = 0.0
        self.numbers: Mapping[str, Any] = {}
        """The latest numbers of the process that reported last."""
        self.waiting: dict[str, float] = {}
        """Seconds that processes have waited for data, by process."""
        self._of_each: dict[str, Mapping[str, Any]] = {}
        self._finished = done
        self._in_progress: dict[str, float] = {}
        self._began = done, time.monotonic()
        self._updated_at = self._began[1]
        self._printed_at = float("-inf")

    def take(self, process: str, record: Mapping[str, Any]) -> None:
        """Update from a record of one of the processes."""
        self._in_progress[process] = record.get("at_hand", 0)
        if self.done == self._began[0]:  # rates are measured from the record before any progress
            self._began = self.done, self._updated_at
        self._updated_at = time.monotonic()
        # producers see each other's finished units with a delay, so their records can disagree:
        # let the count only grow
        finished = max(self._finished, record["done"])
        self._finished = finished
        self.done = min(max(self.done, finished + sum(self._in_progress.values())), record["total"])
        self.total = record["total"]
        if (seconds := record.get("waiting_seconds")) is not None:
            self.waiting.pop(process, None)
            if seconds:
                self.waiting[process] = seconds
            return
        self.waiting.clear()  # a step was trained, so no process is waiting
        self.numbers = self._of_each[process] = {**self._of_each.get(process, {}), **record}

    @property
    def slowest_stage(self) -> str | None:
        """The stage that is slowest for the largest number of producers."""
        stages = Counter(r["busiest"] for r in self._of_each.values() if "busiest" in r)
        return max(stages, key=lambda stage: stages[stage]) if stages else None

    @property
    def left(self) -> timedelta | None:
        """Remaining time at the rate so far; None if unknown."""
        first, since = self._began
        if self.done in (first, self.total):
            return None
        seconds = (time.monotonic() - since) * (self.total - self.done) / (self.done - first)
        return timedelta(seconds=round(seconds))

    def is_due(self) -> bool:
        """Return whether a line is due. If so, count it as printed."""
        over = self.done == self.total and self._printed_at < float("inf")
        if not over and time.monotonic() - self._printed_at < PLAIN_EVERY_SECONDS:
            return False
        self._printed_at = float("inf") if self.done == self.total else time.monotonic()
        return True

    def amount(self) -> str:
        """Format the amount done and the total."""
        if self.total == 1:
            return f"{self.done:.0%}"
        return f"{self.done:,.0f}/{self.total:,.0f}"

    def describe(self) -> str:
        """Describe rates and metrics in a few words, to fit into 80 columns."""
        rates = [
            record.get("worked_rows_per_second", record.get("rows_per_second", 0.0))
            for record in self._of_each.values()
            if "rows_per_second" in record
        ]
        merging = [
            r["entries_per_second"] for r in self._of_each.values() if "entries_per_second" in r
        ]
        parts = [
            metric.text.format(self.numbers[metric.short])
            for metric in listed("progress")
            if metric.text and metric.short in self.numbers and metric.unit != "rows/second"
        ]
        if "fvu" in self.numbers and "dead_share" not in self.numbers:
            parts.append("dead ?")  # not known before dead_after_rows rows
        if self.waiting:
            parts.insert(0, f"waits for data, {max(self.waiting.values()):.0f} s")
        elif rates:
            parts.insert(0, f"{sum(rates):,.0f} rows/s")
        elif merging:
            parts.insert(0, f"{sum(merging):,.0f} entries/s")
        elif doing := self.numbers.get("doing"):
            parts.insert(0, doing)
        return "  ".join(parts)
