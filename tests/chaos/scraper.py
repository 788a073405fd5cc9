"""Reads the metrics of processes that come and go, as Prometheus would."""

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
    """Metrics of this process, on a free port that `target` tells the scraper."""
    telemetry = Telemetry(target.name, role, 0)
    partial = target.with_suffix(".partial")
    partial.write_text(str(telemetry.port))
    partial.rename(target)
    return telemetry


class Scraper:
    """Scrapes all targets in a folder, in turn, while in its `with`.

    Args:
        folder: Holds a file for every target, with its port; its name is the target's.
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
        except (OSError, http.client.HTTPException):  # it has been killed, or is about to be
            target.unlink()
            return
        families = text_string_to_metric_families(text)
        sample = {
            (s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples
        }
        runs = {dict(labels)["run"] for name, labels in sample if name == "dist_sae_run_info"}
        if runs != {target.name}:  # it is dead, and its port another's
            target.unlink()
            return
        self.samples.setdefault(target.name, []).append(sample)

    def values(self, target: str, name: str) -> list[float]:
        """What a metric without labels of its own was, scrape after scrape."""
        return [
            value
            for sample in self.samples[target]
            for (found, labels), value in sample.items()
            if found == name and {label for label, _ in labels} == set(EVERY_SERIES)
        ]

    def check_counters(self) -> None:
        """No counter of any process ever went down."""
        for target, samples in self.samples.items():
            for before, after in pairwise(samples):
                for key, value in before.items():
                    assert key[0] not in COUNTERS or after[key] >= value, (target, key)
