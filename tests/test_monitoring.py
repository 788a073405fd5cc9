"""What monitoring/ says must exist: metrics in the table, runbook sections for every alert."""

import re
from pathlib import Path
from typing import Any

import yaml

from dist_sae.telemetry.metrics import METRICS

MONITORING = Path(__file__).parent.parent / "monitoring"


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_every_metric_that_is_asked_for_exists() -> None:
    known = {metric.name for metric in METRICS}
    text = "".join((MONITORING / name).read_text() for name in ("alerts.yaml", "runbook.md"))
    asked = set(re.findall(r"dist_sae_[a-z0-9_]+", text))
    assert asked
    assert asked <= known


def test_every_alert_has_its_section_in_the_runbook() -> None:
    sections = re.findall(r"^## (\w+)$", (MONITORING / "runbook.md").read_text(), re.MULTILINE)
    anchors = {f"monitoring/runbook.md#{section.lower()}" for section in sections}
    for alert in alerts():
        assert alert["annotations"]["runbook_url"] in anchors, alert["alert"]
    assert len(sections) == len(alerts())
