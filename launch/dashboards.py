"""Writes Grafana's dashboards to monitoring/dashboards/; the tests compare them."""

from pathlib import Path

from dist_sae.deploy.dashboards import render_dashboards

FOLDER = Path(__file__).parent.parent / "monitoring" / "dashboards"

FOLDER.mkdir(exist_ok=True)
for name, text in render_dashboards().items():
    (FOLDER / name).write_text(text)
    print(FOLDER / name)
