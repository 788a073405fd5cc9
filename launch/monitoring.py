"""Writes what is generated in monitoring/: Grafana's dashboards, and the rules for Kubernetes.

The tests compare.
"""

from pathlib import Path

import yaml

from dist_sae.telemetry.dashboards import render_dashboards

FOLDER = Path(__file__).parent.parent / "monitoring"


def render_monitoring() -> dict[str, str]:
    """What is generated, by its path in monitoring/."""
    dashboards = {f"dashboards/{name}": text for name, text in render_dashboards().items()}
    return dashboards | {"prometheusrule.yaml": render_rules()}


def render_rules() -> str:
    """rules.yaml and alerts.yaml as the Prometheus Operator takes them."""
    files = [yaml.safe_load((FOLDER / name).read_text()) for name in ("rules.yaml", "alerts.yaml")]
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "dist-sae"},
        "spec": {"groups": [group for file in files for group in file["groups"]]},
    }
    head = "# Generated from rules.yaml and alerts.yaml by launch/render.sh: edit the former.\n"
    return head + yaml.safe_dump(rule, sort_keys=False, width=100)


def main() -> None:
    """Write all of it."""
    for name, text in render_monitoring().items():
        (FOLDER / name).parent.mkdir(exist_ok=True)
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()
