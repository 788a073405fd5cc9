"""Serves metrics to Prometheus. The only module that creates metrics with prometheus_client."""

import logging
import platform
import time
from collections.abc import Sequence
from copy import copy
from importlib.metadata import version
from typing import Any, Self

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    push_to_gateway,
)

from dist_sae import __version__
from dist_sae.config.cluster import kubernetes_name
from dist_sae.errors import DistSaeError, Stopped
from dist_sae.storage.lives import Life
from dist_sae.telemetry.liveness import Liveness
from dist_sae.telemetry.metric import EVERY_SERIES, SHORT_LIVED, Metric
from dist_sae.telemetry.metrics import metrics_of
from dist_sae.telemetry.process import device_bytes, resident_bytes
from dist_sae.telemetry.server import PageServer

logger = logging.getLogger(__name__)

_PUSH_SECONDS = 5.0


disable_created_metrics()  # type: ignore[no-untyped-call] # a second series for every counter that nobody reads


class Telemetry:
    """The metrics of this process, including how it ended.

    At its end, a process that is being scraped waits for one more scrape, for at most one interval.
    Short-lived programs push their metrics instead.

    Args:
        run: Name of the run; with `jobs`, of the sweep.
        role: The program, one of `metric.ROLES`.
        port: Port to serve metrics on; 0 for any free port, None to serve nothing.
        rank: Number of this process among those of its role.
        pushgateway_url: Pushgateway to push to at the end; None for none.
        jobs: Names of the runs that this process trains, if there are several. Each run gets all
            series.

    Raises:
        TelemetryError: The port is taken.
    """

    def __init__(
        self,
        run: str,
        role: str,
        port: int | None,
        rank: int = 0,
        pushgateway_url: str | None = None,
        jobs: Sequence[str] = (),
    ) -> None:
        labels = {"role": role, "rank": str(rank)}
        self.run_labels = [{"run": name, **labels} for name in jobs or [run]]
        """Labels of each run's series. Every value is set for all of these runs."""
        self._ended: set[str] = set()
        self._pushgateway_url = pushgateway_url
        self._began = time.time()
        self._registry = CollectorRegistry()
        self._only: dict[tuple[str, str], list[str]] = {}
        """Label values that `set_only` set last, by metric and run."""
        self._metrics = {m.name: self._open(m) for m in metrics_of(role)}
        self.create_counters()
        self.liveness = Liveness()
        self.life = Life()
        """Counts this start of the pod, if the process runs in one."""
        self.device: Any = None
        """The device in use, whose memory is exported."""
        self._server = (
            None
            if port is None
            else PageServer(port, lambda _: self.render(), self.liveness.probe_failure)
        )
        self.port = None if self._server is None else self._server.port
        if self.port is not None:
            logger.info("metrics on port %d", self.port)
        names = {"version": __version__, "kubernetes_name": kubernetes_name(run)}
        self.set("dist_sae_run_info", 1, **names)
        self.set(
            "dist_sae_build_info",
            1,
            version=__version__,
            python=platform.python_version(),
            torch=version("torch"),
        )
        self.set("dist_sae_process_start_timestamp_seconds", self._began)
        self.set("dist_sae_run_finished", 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        failed = isinstance(error, Exception) and not isinstance(error, Stopped)
        if error is None or failed:
            self.ended(error)
        if self.run_labels[0]["role"] in SHORT_LIVED:
            self.set("dist_sae_job_seconds", time.time() - self._began)
            self.set("dist_sae_job_end_timestamp_seconds", time.time())
        if self._pushgateway_url is not None:
            self._push(self._pushgateway_url)
        if self._server is not None:
            if error is None or failed:
                self._server.await_last_scrape()
            self._server.close()

    def render(self) -> bytes:
        """Render the page in Prometheus' text format."""
        self.set("dist_sae_process_resident_memory_bytes", resident_bytes())
        for state, held in device_bytes(self.device).items():
            self.set("dist_sae_process_device_memory_bytes", held, state=state)
        return generate_latest(self._registry)

    def of_runs(self, *runs: str) -> Self:
        """Return a view of these metrics that sets values for some of the runs only."""
        view = copy(self)
        view.run_labels = [{**self.run_labels[0], "run": run} for run in runs]
        view.create_counters()
        return view

    def ended(self, error: BaseException | None = None) -> None:
        """Export how the runs ended. A run whose end was already exported is not changed."""
        left = [
            labels_of_run["run"]
            for labels_of_run in self.run_labels
            if labels_of_run["run"] not in self._ended
        ]
        if not left:
            return
        self._ended.update(left)
        view = self.of_runs(*left)
        if error is None:
            view.set("dist_sae_run_finished", 1)
        else:
            name = type(error).__name__ if isinstance(error, DistSaeError) else "bug"
            view.set("dist_sae_run_failed", 1, error=name)

    def create_counters(self) -> None:
        """Create the counters' series at 0, where the values of their labels are known."""
        for metric in metrics_of(self.run_labels[0]["role"]):
            opened = self._metrics[metric.name]
            if isinstance(opened, Counter):
                first, values = metric.labels[:1], metric.values
                known = [{first[0]: value} for value in values] if first else [{}]
                for labels in known:
                    for labels_of_run in self.run_labels:
                        opened.labels(**labels_of_run, **labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        gauge = self._metrics[name]
        assert isinstance(gauge, Gauge)
        for labels_of_run in self.run_labels:
            gauge.labels(**labels_of_run, **labels).set(value)

    def set_only(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge and drop its other series. Labels must be in the metric table's order."""
        for labels_of_run in self.run_labels:
            if before := self._only.get((name, labels_of_run["run"])):
                self._metrics[name].remove(*labels_of_run.values(), *before)
            self._only[name, labels_of_run["run"]] = list(labels.values())
        self.set(name, value, **labels)

    def add(self, name: str, value: float, **labels: str) -> None:
        """Add to a counter."""
        counter = self._metrics[name]
        assert isinstance(counter, Counter)
        for labels_of_run in self.run_labels:
            counter.labels(**labels_of_run, **labels).inc(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add a value to a histogram."""
        histogram = self._metrics[name]
        assert isinstance(histogram, Histogram)
        for labels_of_run in self.run_labels:
            histogram.labels(**labels_of_run, **labels).observe(value)

    def _open(self, metric: Metric) -> Counter | Gauge | Histogram:
        names = metric.name, metric.help, (*EVERY_SERIES, *metric.labels)
        if metric.kind == "gauge":
            return Gauge(*names, registry=self._registry)
        if metric.kind == "histogram":
            return Histogram(*names, registry=self._registry, buckets=metric.buckets)
        return Counter(*names, registry=self._registry)

    def _push(self, url: str) -> None:
        group = {name: self.run_labels[0][name] for name in ("run", "role")}
        try:
            push_to_gateway(url, "dist_sae", self._registry, group, _PUSH_SECONDS)
        except OSError as exc:
            logger.warning("telemetry.pushgateway_url %s: metrics were not pushed: %s", url, exc)
