"""Read pages of metrics as Prometheus does."""

import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from dist_sae.telemetry.metric import EVERY_SERIES
from dist_sae.telemetry.server import SCRAPE_HEADER

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]
"""Values by name and sorted labels."""


def get_page(port: int | None) -> str:
    """Get the metrics page of a port, without the headers of Prometheus."""
    return _page(port, {})


def scrape(port: int | None) -> str:
    """Get the metrics page of a port as Prometheus does, so its process waits for a last scrape."""
    return _page(port, {SCRAPE_HEADER: "10"})


def _page(port: int | None, headers: dict[str, str]) -> str:
    assert port
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=headers)
    with urllib.request.urlopen(request, timeout=20) as answer:
        text: str = answer.read().decode()
        return text


def series(page: str) -> Series:
    """Return all samples of a page.

    Raises:
        ValueError: A series occurs twice.
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
    """Return all values in a process's page, by name and values of the metric's own labels."""
    return {
        (name, *(value for label, value in labels if label not in EVERY_SERIES)): found
        for (name, labels), found in series(page).items()
    }


def of_rank(page: str, name: str) -> dict[str, float]:
    """Return the values of a metric by rank. The metric must have no other label of its own."""
    return {dict(labels)["rank"]: v for (found, labels), v in series(page).items() if found == name}
