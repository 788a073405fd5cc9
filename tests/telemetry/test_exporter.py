"""Metrics over HTTP, from the start of a process to its end."""

import http.client
import itertools
import logging
import re
import socket
import threading
import time
import urllib.error
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

import dist_sae
import dist_sae.errors
import dist_sae.telemetry.server
from dist_sae.commands.cli import main
from dist_sae.errors import NonFiniteError, Stopped, TelemetryError
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.telemetry.metric import ROLES, SHORT_LIVED, Metric
from dist_sae.telemetry.metrics import METRICS, gauges, metrics_of
from tests.telemetry.scrape import get_page, of_rank, scrape, series

UNKNOWN = {"operation": 8, "status": 4, "error": 8}
"""The maximum number of values of a label whose values are not listed in the table: 8 store
operations, 4 response statuses and 8 errors.
"""


def test_metrics_are_served() -> None:
    with Telemetry("my-run.2.0", "train", port=0, rank=3) as telemetry:
        telemetry.set("dist_sae_train_fvu", 0.25)
        text = get_page(telemetry.port)
    labels = 'rank="3",role="train",run="my-run.2.0"'
    assert f"dist_sae_train_fvu{{{labels}}} 0.25" in text
    named = f'kubernetes_name="my-run-2-0",{labels}'
    assert re.search(rf'dist_sae_run_info{{{named},version="[^"]+"}} 1.0', text)
    assert f'dist_sae_train_phase_seconds_total{{phase="wait",{labels}}} 0.0' in text
    assert "dist_sae_train_heldout_fvu{" not in text  # the value is unknown, which is not 0
    assert of_rank(text, "dist_sae_process_resident_memory_bytes")["3"] > 1e7


def test_metrics_are_served_over_ipv4_and_ipv6() -> None:
    """A cluster's pods may have IPv4 addresses, IPv6 addresses, or both."""
    hosts = ["127.0.0.1", "::1"] if socket.has_dualstack_ipv6() else ["127.0.0.1"]
    with Telemetry("my-run", "train", port=0) as telemetry:
        for host in hosts:
            client = http.client.HTTPConnection(host, telemetry.port, timeout=20)
            client.request("GET", "/metrics")
            assert client.getresponse().status == 200
            client.close()


def test_a_producer_says_nothing_of_training() -> None:
    with Telemetry("my-run", "produce", port=0) as telemetry:
        telemetry.add("dist_sae_produce_excluded_rows_total", 3, reason="over_norm")
        telemetry.add("dist_sae_produce_excluded_rows_total", 2, reason="over_norm")
        text = get_page(telemetry.port)
    labels = 'rank="0",reason="over_norm",role="produce",run="my-run"'
    assert f"dist_sae_produce_excluded_rows_total{{{labels}}} 5.0" in text
    assert "dist_sae_train" not in text
    assert "_created" not in text


def test_a_taken_port_is_one_clear_line() -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(TelemetryError, match=f"telemetry.port {port}: cannot be opened"):
            Telemetry("run", "train", port)


@pytest.mark.parametrize(
    ("error", "finished", "failed"),
    [
        (None, 1.0, {}),
        (Stopped("stopped"), 0.0, {}),
        (NonFiniteError("nan"), 0.0, {"NonFiniteError": 1.0}),
        (ZeroDivisionError(), 0.0, {"bug": 1.0}),
    ],
)
def test_how_a_process_ended_is_among_its_metrics(
    error: Exception | None, finished: float, failed: dict[str, float]
) -> None:
    telemetry = Telemetry("run", "train", None)
    telemetry.__exit__(type(error) if error else None, error, None)
    found = series(telemetry.render().decode())
    ends = {dict(key)["error"]: v for (name, key), v in found.items() if "run_failed" in name}
    assert of_rank(telemetry.render().decode(), "dist_sae_run_finished") == {"0": finished}
    assert ends == failed


def test_errors_keep_the_names_that_alerts_may_match() -> None:
    """The names are values of the label `error`, so a rename breaks alerts and silences."""
    names = """
        AbandonedError AccessError ArgumentError ClusterError ConfigError CorpusError
        CorruptObjectError DataExhaustedError DistSaeError DivergedError EndpointError
        EndpointUnavailableError ForbiddenError HeadlessError HubUnavailableError JobsFailedError
        LacksWeightsError LatentNotFoundError LivesSpentError ModelError NoIndexError
        NonFiniteError NotStartedError ObjectNotFoundError PartFailedError PlanMismatchError
        ProcessFailedError RankLostError RejectedError RunTakenError Stopped StoreError
        StoreFullError TelemetryError UnavailableError UnitMissingError
    """
    found = {name for name, kind in vars(dist_sae.errors).items() if isinstance(kind, type)}
    assert found == set(names.split())


def test_a_process_that_is_scraped_stays_until_its_last_values_were_seen() -> None:
    pages: list[str] = []
    several, over = threading.Event(), threading.Event()

    def watch(port: int | None) -> None:
        while True:
            try:
                pages.append(scrape(port))
            except (urllib.error.URLError, ConnectionError):
                return
            if len(pages) > 2:
                several.set()
            over.wait(0.05)

    with Telemetry("run", "train", 0) as telemetry:
        scraper = threading.Thread(target=watch, args=(telemetry.port,))
        scraper.start()
        assert several.wait(20)
    scraper.join()
    assert of_rank(pages[-1], "dist_sae_run_finished") == {"0": 1.0}


def test_a_process_that_nobody_scrapes_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist_sae.telemetry.server, "LAST_SCRAPE_SECONDS", 600.0)
    since = time.monotonic()
    with Telemetry("run", "train", 0) as telemetry:
        get_page(telemetry.port)  # a person or `dist-sae status`, not Prometheus
        get_page(telemetry.port)
    assert time.monotonic() - since < 300


def test_a_process_that_was_scraped_once_stays_for_the_second_time() -> None:
    """The time of the next scrape is unknown, and requests from other clients do not count."""
    pages: list[str] = []
    over = threading.Event()
    with Telemetry("run", "train", 0) as telemetry:
        scrape(telemetry.port)

        def finish() -> None:
            while not pages:
                try:
                    if of_rank(get_page(telemetry.port), "dist_sae_run_finished") == {"0": 1.0}:
                        pages.append(scrape(telemetry.port))
                except (ConnectionError, urllib.error.URLError) as exc:
                    if isinstance(getattr(exc, "reason", exc), ConnectionRefusedError):
                        # the process has exited; other errors come from the full queue of five
                        # connections
                        raise
                over.wait(0.05)

        finishing = threading.Thread(target=finish)
        finishing.start()
    finishing.join()
    assert of_rank(pages[0], "dist_sae_run_finished") == {"0": 1.0}


class Gateway(HTTPServer):
    """A server that accepts pushes, like Prometheus's Pushgateway."""

    def __init__(self) -> None:
        pushed = self.pushed = dict[str, str]()

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                pushed[self.path] = body.decode()
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)


def test_a_short_program_pushes_its_metrics_at_its_end() -> None:
    with Gateway() as gateway:
        serving = threading.Thread(target=gateway.handle_request)
        serving.start()
        url = f"http://127.0.0.1:{gateway.server_port}"
        with Telemetry("my-run", "evaluate", None, pushgateway_url=url) as telemetry:
            telemetry.set("dist_sae_evaluate_fvu", 0.125)
        serving.join()
    (path,) = gateway.pushed
    assert path == "/metrics/job/dist_sae/role/evaluate/run/my-run"
    page = gateway.pushed[path]
    assert of_rank(page, "dist_sae_evaluate_fvu") == {"0": 0.125}
    assert of_rank(page, "dist_sae_run_finished") == {"0": 1.0}
    assert of_rank(page, "dist_sae_job_seconds")["0"] > 0


def test_a_push_that_fails_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as closed:  # bound but not listening, so it refuses connections
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with (
            caplog.at_level(logging.WARNING),
            Telemetry("run", "export", None, pushgateway_url=url),
        ):
            pass
    (said,) = caplog.messages
    assert said.startswith(f"telemetry.pushgateway_url {url}: metrics were not pushed: ")


def test_names_follow_the_conventions_of_prometheus() -> None:
    for metric in METRICS:
        assert re.fullmatch(r"dist_sae_[a-z0-9_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert metric.help.endswith(".")
        name = metric.name.removesuffix("_total")
        for unit in ("seconds", "bytes"):
            assert name.endswith(f"_{unit}") == (metric.unit == unit), metric.name
        assert set(metric.roles) <= set(ROLES)
        assert not metric.values or len(metric.labels) == 1
    assert len({metric.name for metric in METRICS}) == len(METRICS)


@pytest.mark.parametrize("role", ROLES)
def test_a_record_sets_each_gauge_by_its_short_name(role: str) -> None:
    """Each short name belongs to one metric, and every metric in a listing has a title and a
    format.
    """
    known = [metric for metric in metrics_of(role) if metric.short]
    assert len({metric.short for metric in known}) == len(known)
    record = {m.short: {"a": 1.0} if m.labels else 1.0 for m in known} | {"unknown": 1.0}
    assert [name for name, _, _ in gauges(role, record)] == [metric.name for metric in known]
    for metric in known:
        assert metric.kind == "gauge"
        assert metric.title, metric.name
        assert not metric.text or re.search("[0-9]", metric.text.format(0.25)), metric.name


def test_full_metric_names_are_written_out() -> None:
    """No name is assembled from pieces, so a search for a metric finds all of its uses."""
    for path in Path(dist_sae.__file__).parent.rglob("*.py"):
        assert not re.search(r"dist_sae_[a-z_]*\{(?!\{)", path.read_text()), path


@pytest.mark.parametrize("role", ROLES)
def test_a_rank_has_at_most_500_series(role: str) -> None:
    telemetry = Telemetry("run", role, None)
    for metric in metrics_of(role):
        for labels in every_label(metric):
            match metric.kind:
                case "gauge":
                    telemetry.set(metric.name, 1, **labels)
                case "counter":
                    telemetry.add(metric.name, 1, **labels)
                case "histogram":
                    telemetry.observe(metric.name, 1, **labels)
    found = series(telemetry.render().decode())
    names = {name for name, _ in found}
    assert {metric.name for metric in metrics_of(role) if metric.kind != "histogram"} <= names
    assert len(found) <= 500


def every_label(metric: Metric) -> list[dict[str, str]]:
    """Return every combination of values that a metric's labels may have."""
    values = [
        metric.values or [f"{label}-{i}" for i in range(UNKNOWN.get(label, 1))]
        for label in metric.labels
    ]
    return [dict(zip(metric.labels, chosen, strict=True)) for chosen in itertools.product(*values)]


def test_only_programs_that_cannot_be_scraped_have_the_metrics_of_their_end() -> None:
    of_jobs = {metric.name: metric.roles for metric in METRICS if "_job_" in metric.name}
    assert of_jobs
    assert set(of_jobs.values()) == {SHORT_LIVED}


def test_the_table_for_people_is_the_one_in_the_repository(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The table is valid Markdown: every row has six cells, even if a help text contains bars."""
    assert main(["config", "metrics"]) == 0
    table = Path(__file__).parents[2] / "monitoring" / "metrics.md"
    rows = [line for line in table.read_text().splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {7}
    # if this fails, print the table to that file again
    assert capsys.readouterr().out == table.read_text()
