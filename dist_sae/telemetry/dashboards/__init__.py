"""The Grafana dashboards, ordered by an operator's questions.

Is it healthy, how long will it take, what limits it?
"""

import re

from dist_sae.errors import ConfigError
from dist_sae.telemetry.dashboards.dictionary import DICTIONARY
from dist_sae.telemetry.dashboards.index import INDEX
from dist_sae.telemetry.dashboards.overview import OVERVIEW
from dist_sae.telemetry.dashboards.panels import Page, Panel
from dist_sae.telemetry.dashboards.producers import PRODUCERS
from dist_sae.telemetry.dashboards.store import STORE
from dist_sae.telemetry.dashboards.trainer import TRAINER
from dist_sae.telemetry.metrics import METRICS

PAGES = (OVERVIEW, TRAINER, PRODUCERS, STORE, DICTIONARY, INDEX)
"""All dashboards: first the overview, then those with details."""


def render_dashboards() -> dict[str, str]:
    """Render Grafana's JSON for every dashboard, by file name.

    Raises:
        ConfigError: Grafana's SDK is not installed.
    """
    try:
        from dist_sae.telemetry.dashboards.grafana import render_page  # its SDK is in an extra
    except ImportError as exc:
        raise ConfigError(
            "dashboards: rendering needs Grafana's SDK; run pip install '.[dashboards]' in the "
            "repository"
        ) from exc
    return {
        f"{page.name}.json": render_page(_explained(page), [p for p in PAGES if p is not page])
        for page in PAGES
    }


def _explained(page: Page) -> Page:
    """Add the help texts of its metrics to each panel of a dashboard."""
    explained = {
        question: tuple(map(_with_help, panels)) for question, panels in page.sections.items()
    }
    return page._replace(sections=explained)


def _with_help(panel: Panel) -> Panel:
    asked = {name for query in panel.queries for name in re.findall(r"dist_sae_\w+", query.expr)}
    helps = [f"`{metric.name}`: {metric.help}" for metric in METRICS if metric.name in asked]
    return panel._replace(description="\n\n".join(filter(None, [panel.description, *helps])))
