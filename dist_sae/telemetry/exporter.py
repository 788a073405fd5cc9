"""Serves the metrics to Prometheus; the only module that talks to prometheus_client."""

import logging
from typing import Self

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    start_http_server,
)

from dist_sae import __version__
from dist_sae.errors import TelemetryError
from dist_sae.telemetry.metrics import METRICS

logger = logging.getLogger(__name__)


disable_created_metrics()  # type: ignore[no-untyped-call] # a second series for every counter that nobody reads


def _belongs(name: str, role: str) -> bool:
    """A producer says nothing of training, rather than that its loss is 0."""
    other = "train" if role == "produce" else "produce"
    checkpoints = name.startswith("dist_sae_checkpoint_") and role == "produce"
    return not (name.startswith(f"dist_sae_{other}_") or checkpoints)


class Telemetry:
    """The metrics of this process.

    Args:
        run: Name of the run.
        role: What this process is: `produce` or `train`.
        port: Where to serve them; 0 takes any free port, None serves nothing.

    Raises:
        TelemetryError: The port is taken.
    """

    def __init__(self, run: str, role: str, port: int | None) -> None:
        registry = CollectorRegistry()
        self._gauges = {
            m.name: Gauge(m.name, m.help, m.labels, registry=registry)
            for m in METRICS
            if m.kind == "gauge" and _belongs(m.name, role)
        }
        self._counters = {
            m.name: Counter(m.name, m.help, m.labels, registry=registry)
            for m in METRICS
            if m.kind == "counter" and _belongs(m.name, role)
        }
        self._histograms = {
            m.name: Histogram(m.name, m.help, m.labels, registry=registry)
            for m in METRICS
            if m.kind == "histogram" and _belongs(m.name, role)
        }
        self.port: int | None = None
        self._server = None
        if port is not None:
            try:
                self._server, _ = start_http_server(port, registry=registry)
            except OSError as exc:
                raise TelemetryError(
                    f"telemetry.port {port}: cannot be opened ({exc.strerror}); "
                    f"choose another, or 0 for any free one"
                ) from exc
            self.port = self._server.server_port
            logger.info("metrics on port %d", self.port)
        self.set("dist_sae_run_info", 1, run=run, role=role, version=__version__)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        gauge = self._gauges[name]
        (gauge.labels(**labels) if labels else gauge).set(value)

    def add(self, name: str, value: float, **labels: str) -> None:
        """Add to a counter."""
        counter = self._counters[name]
        (counter.labels(**labels) if labels else counter).inc(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Put a value into a histogram."""
        self._histograms[name].labels(**labels).observe(value)
