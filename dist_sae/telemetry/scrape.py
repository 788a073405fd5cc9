"""Reads pages of metrics (`telemetry/exporter.py`) as Prometheus does."""

from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families


class Sample(NamedTuple):
    """One value of a time series."""

    name: str
    labels: dict[str, str]
    value: float


def read_page(text: str) -> list[Sample]:
    """Parse all samples of a page in Prometheus' text format.

    Raises:
        ValueError: The text is not in that format.
    """
    families = text_string_to_metric_families(text)
    return [Sample(s.name, dict(s.labels), s.value) for family in families for s in family.samples]
