"""Real Prometheus, Alertmanager and Pushgateway on loopback, and a receiver of alerts."""

import json
import queue
import shutil
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tests.monitoring.files import MONITORING
from tests.servers import answers, free_ports, running

INTERVAL = "1s"
"""Interval of scrapes and rule evaluations."""


class Prometheus(NamedTuple):
    """A running Prometheus server."""

    url: str

    def ask(self, path: str, **parameters: str) -> Any:
        """Query the API, and return the response's data."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Evaluate an expression at the current time, and return its series."""
        result: list[dict[str, Any]] = self.ask("query", query=expression)["result"]
        return result


@contextmanager
def prometheus(
    folder: Path, targets: Sequence[str], gateway: str, alertmanager: str
) -> Iterator[Prometheus]:
    """Start Prometheus with this project's rules and configuration, at short intervals.

    Args:
        folder: Folder for its files.
        targets: host:port of each program that it scrapes.
        gateway: host:port of the Pushgateway.
        alertmanager: host:port of Alertmanager.
    """
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": INTERVAL, "evaluation_interval": INTERVAL}
    config["rule_files"] = [str(folder / name) for name in config["rule_files"]]
    config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [alertmanager]
    programs, pushed = config["scrape_configs"]
    # the labels that the PodMonitor adds on a cluster
    of_pods = {"namespace": "research", "app_kubernetes_io_instance": "world"}
    programs["static_configs"] = [{"targets": list(targets), "labels": of_pods}]
    pushed["static_configs"] = [{"targets": [gateway], "labels": {"namespace": "research"}}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (folder / "rules.yaml").write_text((MONITORING / "rules.yaml").read_text())
    (folder / "alerts.yaml").write_text(_with_short_delay((MONITORING / "alerts.yaml").read_text()))
    port = free_ports(1)
    command = [
        _installed("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with _server(command, folder / "prometheus.log", port):
        yield Prometheus(f"http://127.0.0.1:{port}")


@contextmanager
def alertmanager(folder: Path, webhook: str) -> Iterator[str]:
    """Start Alertmanager with this project's example config, without delays. Yields host:port."""
    config = yaml.safe_load((MONITORING / "alertmanager.yml").read_text())
    for route in [config["route"], *config["route"]["routes"]]:
        route["group_wait"] = "0s"
    config["receivers"][0]["webhook_configs"][0]["url"] = webhook
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(config))
    port = free_ports(1)
    command = [
        _installed("prometheus-alertmanager"),
        f"--config.file={folder / 'alertmanager.yml'}",
        f"--storage.path={folder / 'alertmanager'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--cluster.listen-address=",
    ]
    with _server(command, folder / "alertmanager.log", port):
        yield f"127.0.0.1:{port}"


@contextmanager
def pushgateway(folder: Path) -> Iterator[str]:
    """Start a Pushgateway that stores nothing on disk. Yields its host:port."""
    port = free_ports(1)
    program = _installed("prometheus-pushgateway")
    # without --persistence.file, Debian's build reads and writes a file in /var/lib
    command = [program, f"--web.listen-address=127.0.0.1:{port}", "--persistence.file="]
    with _server(command, folder / "pushgateway.log", port):
        yield f"127.0.0.1:{port}"


@contextmanager
def webhook() -> Iterator[tuple[str, "queue.Queue[dict[str, Any]]"]]:
    """Receive alerts. Yields the URL, and a queue with the received alerts."""
    alerts: queue.Queue[dict[str, Any]] = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            for alert in message["alerts"]:
                alerts.put(alert)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/alerts", alerts
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _with_short_delay(rules: str) -> str:
    """Shorten the delay of the tested alert, but not so far that a missed scrape fires it."""
    groups = yaml.safe_load(rules)
    for group in groups["groups"]:
        for rule in group["rules"]:
            if rule["alert"] == "DistSaeTrainersGone":
                rule["for"] = "3s"
    return yaml.safe_dump(groups)


@contextmanager
def _server(command: list[str], log: Path, port: int) -> Iterator[None]:
    with running(command, log) as process:
        if not answers(process, f"http://127.0.0.1:{port}/-/ready", 200):
            raise RuntimeError(log.read_text()[-2000:])
        yield


def _installed(program: str) -> str:
    path = shutil.which(program)
    assert path, f"{program} is missing: launch/test.sh installs it, as root; else ask for it"
    return path
