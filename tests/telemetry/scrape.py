"""Reads pages of metrics as Prometheus does."""

import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from dist_sae.telemetry.metric import EVERY_SERIES
from dist_sae.telemetry.server import SCRAPE_HEADER

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]
"""Values by name and sorted labels."""


def look(port: int | None) -> str:
    """The page of a port, as anybody asks for it."""
    return _page(port, {})


def scrape(port: int | None) -> str:
    """The page of a port, as Prometheus asks for it: who is asked stays for the next time."""
    return _page(port, {SCRAPE_HEADER: "10"})


def _page(port: int | None, headers: dict[str, str]) -> str:
    assert port
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=headers)
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
