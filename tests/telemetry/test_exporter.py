"""Metrics over HTTP, and the history in the run's folder."""

import re
import socket
import urllib.request
from pathlib import Path

import pytest

from dist_sae.errors import TelemetryError
from dist_sae.storage import open_store
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.telemetry.history import History, read_history
from dist_sae.telemetry.metrics import METRICS


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text: str = answer.read().decode()
        return text


def test_metrics_are_served() -> None:
    with Telemetry("my-run", "train", port=0, rank=3) as telemetry:
        telemetry.set("dist_sae_train_fvu", 0.25)
        assert telemetry.port
        text = scrape(telemetry.port)
    labels = 'rank="3",role="train",run="my-run"'
    assert f"dist_sae_train_fvu{{{labels}}} 0.25" in text
    assert re.search(rf'dist_sae_run_info{{{labels},version="[^"]+"}} 1.0', text)


def test_a_producer_says_nothing_of_training() -> None:
    with Telemetry("my-run", "produce", port=0) as telemetry:
        telemetry.add("dist_sae_produce_excluded_rows_total", 3, reason="over_norm")
        telemetry.add("dist_sae_produce_excluded_rows_total", 2, reason="over_norm")
        assert telemetry.port
        text = scrape(telemetry.port)
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


def test_names_follow_the_conventions_of_prometheus() -> None:
    for metric in METRICS:
        assert re.fullmatch(r"dist_sae_[a-z0-9_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert metric.help.endswith(".")
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_steps_that_were_repeated_after_a_restart_count_once(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    first = History(store, "run", 0)
    for step in (10, 20, 30):
        first.append({"step": step, "fvu": 1.0})
        first.flush()
    second = History(store, "run", 20)  # the checkpoint was at step 20
    second.append({"step": 30, "fvu": 0.5})
    second.flush()
    records = read_history(store, "run")
    assert [(r["step"], r["fvu"]) for r in records] == [(10, 1.0), (20, 1.0), (30, 0.5)]
