"""Rules and alerts under promtool: each alert fires when it should, and only then."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_sae.telemetry.metrics import METRICS
from tests.kubernetes.schemas import check, needs_definitions
from tests.monitoring.files import MONITORING, alerts, metrics_in, recorded_in, rules

pytestmark = pytest.mark.system

HERE = Path(__file__).parent
RUNBOOK = (MONITORING / "runbook.md").read_text()


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(
        ["promtool", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def unit_tests(name: str) -> list[dict[str, Any]]:
    tests: list[dict[str, Any]] = yaml.safe_load((HERE / name).read_text())["tests"]
    return tests


def test_promtool_takes_them() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", *sorted(MONITORING.glob("*s.yaml")))
    promtool("check", "config", MONITORING / "prometheus.yml")


def test_rules_and_alerts_say_what_their_unit_tests_expect() -> None:
    promtool("test", "rules", HERE / "rules_test.yaml", HERE / "alerts_test.yaml")


@needs_definitions
def test_the_operator_takes_them() -> None:
    check(yaml.safe_load((MONITORING / "prometheusrule.yaml").read_text()))


def test_every_rule_is_tested() -> None:
    tested = {
        name
        for test in unit_tests("rules_test.yaml")
        for case in test["promql_expr_test"]
        for name in recorded_in(case["expr"])
        if case["exp_samples"]
    }
    assert tested == {rule["record"] for rule in rules()}


def test_every_alert_is_seen_to_fire_and_to_stay_silent() -> None:
    cases = [case for test in unit_tests("alerts_test.yaml") for case in test["alert_rule_test"]]
    names = {alert["alert"] for alert in alerts()}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == names
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == names


def test_every_metric_that_is_asked_for_exists() -> None:
    known = {metric.name for metric in METRICS}
    texts = [path.read_text() for path in MONITORING.rglob("*.*") if path.suffix != ".png"]
    asked = metrics_in("\n".join(texts))
    assert asked
    assert asked <= known
    assert recorded_in("\n".join(texts)) <= {rule["record"] for rule in rules()}


def test_every_alert_says_what_how_bad_how_much_and_what_to_do() -> None:
    sections = re.findall(r"^## (\w+)$", RUNBOOK, re.MULTILINE)
    assert sections == [alert["alert"] for alert in alerts()]
    for alert in alerts():
        assert alert["labels"]["severity"] in {"critical", "warning"}
        assert "$labels.run" in alert["annotations"]["summary"]
        assert "$value" in alert["annotations"]["summary"]
        anchor = f"monitoring/runbook.md#{alert['alert'].lower()}"
        assert alert["annotations"]["runbook_url"] == anchor


def test_links_of_a_cluster_lead_to_the_runbook_from_anywhere() -> None:
    """The links are absolute, and one line of the kustomization sets the runbook's location."""
    kubectl = Path(sys.executable).parent / "kubectl"
    built = subprocess.run(
        [kubectl, "kustomize", MONITORING], capture_output=True, text=True, check=True
    )
    objects = list(yaml.load_all(built.stdout, yaml.CSafeLoader))
    assert {obj["metadata"]["name"] for obj in objects} == {"dist-sae", "dist-sae-dashboards"}
    (rule,) = (obj for obj in objects if obj["kind"] == "PrometheusRule")
    check(rule)
    place = "https://git.example.com/dist_sae/monitoring/runbook.md"
    made = [r for group in rule["spec"]["groups"] for r in group["rules"] if "alert" in r]
    assert [r["annotations"]["runbook_url"] for r in made] == [
        f"{place}#{alert['alert'].lower()}" for alert in alerts()
    ]


def test_every_section_of_the_runbook_says_what_why_and_what_to_do() -> None:
    for section in re.split(r"^## ", RUNBOOK, flags=re.MULTILINE)[1:]:
        for part in ("**Means.**", "**Look.**", "**Do.**"):
            assert part in section, section.partition("\n")[0]
