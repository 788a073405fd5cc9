"""Reads pages of metrics as Prometheus does."""

import urllib.request
from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

from dist_sae.telemetry.metrics import EVERY_SERIES
from dist_sae.telemetry.server import SCRAPE_HEADER

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]
"""Values by name and sorted labels."""


def scrape(port: int | None) -> str:
    """The page of a port, as Prometheus asks for it."""
    return look(port, {SCRAPE_HEADER: "10"})


def look(port: int | None, headers: Mapping[str, str] = {}) -> str:
    """The page of a port, as anybody asks for it."""
    assert port
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=dict(headers))
    with urllib.request.urlopen(request, timeout=20) as answer:
        text: str = answer.read().decode()
        return text


def series(page: str) -> Series:
    """Every sample of a page.

    Raises:
        ValueError: A series is there twice.
    """
    found: Series = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            if key in found:
                raise ValueError(f"{key} is there twice")
            found[key] = sample.value
    return found


def values(page: str) -> dict[tuple[str, ...], float]:
    """Every value of a page of one process, by name and the values of its own labels."""
    return {
        (name, *(value for label, value in labels if label not in EVERY_SERIES)): found
        for (name, labels), found in series(page).items()
    }


def of_rank(page: str, name: str) -> dict[str, float]:
    """The values of a metric without other labels, by rank."""
    return {dict(labels)["rank"]: v for (found, labels), v in series(page).items() if found == name}
