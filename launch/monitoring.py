"""Write the generated files of monitoring/: Grafana dashboards and the PrometheusRule.

Tests check that the committed files are up to date.
"""

from pathlib import Path

import yaml

from dist_sae.telemetry.dashboards import render_dashboards

FOLDER = Path(__file__).parent.parent / "monitoring"


def render_monitoring() -> dict[str, str]:
    """Return the generated files by path in monitoring/."""
    dashboards = {f"dashboards/{name}": text for name, text in render_dashboards().items()}
    return dashboards | {"prometheusrule.yaml": render_rules()}


def render_rules() -> str:
    """Render rules.yaml and alerts.yaml as a PrometheusRule for the Prometheus Operator."""
    files = [yaml.safe_load((FOLDER / name).read_text()) for name in ("rules.yaml", "alerts.yaml")]
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "dist-sae"},
        "spec": {"groups": [group for file in files for group in file["groups"]]},
    }
    head = "# Generated from rules.yaml and alerts.yaml by launch/render.sh; edit those files.\n"
    return head + yaml.safe_dump(rule, sort_keys=False, width=100)


def main() -> None:
    """Write all generated files."""
    for name, text in render_monitoring().items():
        (FOLDER / name).parent.mkdir(exist_ok=True)
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()
