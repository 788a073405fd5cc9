"""`dist-sae bench metrics` as a program."""

import json

import pytest

from tests.bench.test_step import SMALL
from tests.launch import run

pytestmark = pytest.mark.system


def test_bench_metrics_reports_what_reports_and_scrapes_cost() -> None:
    result = json.loads(run("bench", "metrics", *SMALL, "--json").splitlines()[-1])
    assert result["ratio_low"] <= result["ratio"] <= result["ratio_high"]
    assert 0 < result["reporting_share"] < 1
    assert 0 < result["scrape_seconds"] <= result["scrape_seconds_most"]
    assert 0 < result["pod_scrape_seconds"] <= result["pod_scrape_seconds_most"]
    assert 50 < result["series"] <= 500
