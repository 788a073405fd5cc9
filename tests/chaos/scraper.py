"""Scraper that reads the metrics of processes that start and end, as Prometheus would."""

import http.client
import threading
import urllib.request
from itertools import pairwise
from pathlib import Path
from typing import Self

from prometheus_client.parser import text_string_to_metric_families

from dist_sae.telemetry.exporter import Telemetry
from dist_sae.telemetry.metric import EVERY_SERIES
from dist_sae.telemetry.metrics import METRICS

INTERVAL_SECONDS = 0.1
COUNTERS = {metric.name for metric in METRICS if metric.kind == "counter"}

Sample = dict[tuple[str, tuple[tuple[str, str], ...]], float]
"""Values by name and labels."""


def serve(role: str, target: Path) -> Telemetry:
    """Serve this process's metrics on a free port, and write the port to `target`."""
    telemetry = Telemetry(target.name, role, 0)
    partial = target.with_suffix(".partial")
    partial.write_text(str(telemetry.port))
    partial.rename(target)
    return telemetry


class Scraper:
    """Scrapes all targets in a folder, one after the other, inside its `with` block.

    Args:
        folder: Folder with a file per target. The file has the target's name, and contains its
            port.
    """

    def __init__(self, folder: Path) -> None:
        self.samples: dict[str, list[Sample]] = {}
        self._folder = folder
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scraper")
        self._failure: BaseException | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            while not self._over.wait(INTERVAL_SECONDS):
                for target in sorted(self._folder.iterdir()):
                    if target.suffix != ".partial":
                        self._scrape(target)
        except BaseException as exc:
            self._failure = exc

    def _scrape(self, target: Path) -> None:
        try:
            url = f"http://127.0.0.1:{target.read_text()}/metrics"
            with urllib.request.urlopen(url, timeout=10) as answer:
                text = answer.read().decode()
        except (OSError, http.client.HTTPException):  # the process was killed, or is ending
            target.unlink()
            return
        families = text_string_to_metric_families(text)
        sample = {
            (s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples
        }
        runs = {dict(labels)["run"] for name, labels in sample if name == "dist_sae_run_info"}
        if runs != {target.name}:  # the process is dead, and another process has its port
            target.unlink()
            return
        self.samples.setdefault(target.name, []).append(sample)

    def values(self, target: str, name: str) -> list[float]:
        """Return the value of a metric without labels of its own, at each scrape."""
        return [
            value
            for sample in self.samples[target]
            for (found, labels), value in sample.items()
            if found == name and {label for label, _ in labels} == set(EVERY_SERIES)
        ]

    def check_counters(self) -> None:
        """Check that no counter of any process ever decreased."""
        for target, samples in self.samples.items():
            for before, after in pairwise(samples):
                for key, value in before.items():
                    assert key[0] not in COUNTERS or after[key] >= value, (target, key)
