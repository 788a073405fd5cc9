"""Renders Grafana's JSON for a dashboard. The only module that uses Grafana's SDK."""

import json
from collections.abc import Sequence
from itertools import count
from string import ascii_uppercase
from typing import TypeVar

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as style
from grafana_foundation_sdk.models import dashboard as schema
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from dist_sae.telemetry.dashboards.panels import Page, Panel, Shape, Unit

GENERATED = "Generated from dist_sae/telemetry/dashboards/ by launch/render.sh; edit the source."
_SOURCE = schema.DataSourceRef(type_val="prometheus", uid="${datasource}")
_GRAFANA_UNITS: dict[Unit, str] = {
    "count": "short",
    "share": "percentunit",
    "seconds": "s",
    "bytes": "bytes",
    "bytes/s": "Bps",
    "rows/s": "rowsps",
    "per second": "cps",
}
_SIZES: dict[Shape, tuple[int, int]] = {  # width in 24ths, height
    "graph": (8, 8),
    "stack": (8, 8),
    "number": (4, 4),
    "table": (24, 4),
}


def render_page(page: Page, others: Sequence[Page]) -> str:
    """Render Grafana's JSON for a dashboard.

    Args:
        page: The dashboard.
        others: The dashboards to link to.
    """
    built = (
        dashboard.Dashboard(page.title)
        .uid(page.uid)
        .description(f"{page.description} {GENERATED}")
        .tags(["dist-sae", "generated"])
        .readonly()
        .tooltip(schema.DashboardCursorSync.CROSSHAIR)
        .time("now-3h", "now")
        .refresh("30s")
        .timezone("browser")
        .variables(_variables(page))
        .links([_link(other) for other in others])
        .annotation(_alerts())
    )
    numbers = count(1)
    for question, panels in page.sections.items():
        built.with_row(dashboard.Row(question).id(next(numbers)))
        for panel in panels:
            built.with_panel(_panel(panel, next(numbers)))
    return json.dumps(built.build(), cls=JSONEncoder, indent=1) + "\n"


def _variables(page: Page) -> list[Builder[schema.VariableModel]]:
    def choice(name: str, query: str) -> dashboard.QueryVariable:
        return (
            dashboard.QueryVariable(name)
            .label(name)
            .datasource(_SOURCE)
            .query(query)
            .refresh(schema.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(schema.VariableSort.NUMERICAL_ASC)
            .multi(True)
        )

    source = dashboard.DatasourceVariable("datasource").label("data source").type("prometheus")
    everything = schema.VariableOption(text="All", value="$__all", selected=True)
    namespaces = choice("namespace", "label_values(dist_sae_run_info, namespace)")
    here = 'namespace=~"$namespace"'
    variables: list[Builder[schema.VariableModel]] = [
        source,
        # outside Kubernetes series have no namespace, which .* also matches
        namespaces.include_all(True).all_value(".*").current(everything),
        # a single run, until the user chooses more
        choice("run", f"label_values(dist_sae_run_info{{{here}}}, run)"),
    ]
    if page.ranks:
        of_role = f'dist_sae_run_info{{{here},run=~"$run",role="{page.ranks}"}}'
        ranks = choice("rank", f"label_values({of_role}, rank)")
        variables.append(ranks.include_all(True).current(everything))
    return variables


def _link(page: Page) -> dashboard.DashboardLink:
    return (
        dashboard.DashboardLink(page.title)
        .type(schema.DashboardLinkType.LINK)
        .url(f"/d/{page.uid}")
        .tooltip(page.description)
        .include_vars(True)
        .keep_time(True)
    )


def _alerts() -> dashboard.AnnotationQuery:
    """Show alerts as marks on every graph."""
    return (
        dashboard.AnnotationQuery()
        .name("Alerts")
        .datasource(_SOURCE)
        .enable(True)
        .icon_color("red")
        .expr(
            'ALERTS{namespace=~"$namespace",run=~"$run",alertstate="firing",alertname=~"DistSae.*"}'
        )
    )


def _panel(panel: Panel, number: int) -> Builder[schema.Panel]:
    match panel.shape:
        case "graph" | "stack":
            return _graph(panel).id(number)
        case "number":
            return _number(panel).id(number)
        case "table":
            return _table(panel).id(number)


_Built = TypeVar("_Built", timeseries.Panel, stat.Panel, table.Panel)


def _begin(built: _Built, panel: Panel) -> _Built:
    """Set the properties that panels of every shape have."""
    width, height = _SIZES[panel.shape]
    built.title(panel.title).description(panel.description).datasource(_SOURCE)
    return built.span(panel.width or width).height(height)


def _graph(panel: Panel) -> timeseries.Panel:
    graph = (
        _begin(timeseries.Panel(), panel)
        .unit(_GRAFANA_UNITS[panel.unit])
        .legend(
            common.VizLegendOptions()
            .display_mode(style.LegendDisplayMode.LIST)
            .placement(style.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(
            common.VizTooltipOptions()
            .mode(style.TooltipDisplayMode.MULTI)
            .sort(style.SortOrder.DESCENDING)
        )
        .show_points(style.VisibilityMode.NEVER)
        .targets([target.range() for target in _targets(panel)])
    )
    if panel.limits:
        graph.thresholds(_thresholds(panel.limits)).thresholds_style(
            common.GraphThresholdsStyleConfig().mode(style.GraphThresholdsStyleMode.DASHED)
        )
    if panel.shape == "stack":
        graph.stacking(common.StackingConfig().mode(style.StackingMode.NORMAL)).fill_opacity(40)
    return graph


def _number(panel: Panel) -> stat.Panel:
    return (
        _begin(stat.Panel(), panel)
        .unit(_GRAFANA_UNITS[panel.unit])
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .graph_mode(style.BigValueGraphMode.AREA)
        .wide_layout(True)
        .color_mode(style.BigValueColorMode.VALUE if panel.limits else style.BigValueColorMode.NONE)
        .thresholds(_thresholds(panel.limits))
        .no_value("none")
        .targets([target.range() for target in _targets(panel)])
    )


def _table(panel: Panel) -> table.Panel:
    """Build a table with a line for every series, and its labels in columns."""
    hidden = dict.fromkeys(("Time", "__name__", "Value", "alertstate"), True)
    return (
        _begin(table.Panel(), panel)
        .no_value("none")
        .show_header(True)
        .with_transformation(
            schema.DataTransformerConfig(id_val="organize", options={"excludeByName": hidden})
        )
        .targets([target.instant().format(PromQueryFormat.TABLE) for target in _targets(panel)])
    )


def _targets(panel: Panel) -> list[prometheus.Dataquery]:
    return [
        prometheus.Dataquery().ref_id(letter).expr(query.expr).legend_format(query.legend)
        for letter, query in zip(ascii_uppercase, panel.queries, strict=False)
    ]


def _thresholds(limits: Sequence[float]) -> dashboard.ThresholdsConfig:
    colours = ["green", "yellow", "red"] if len(limits) > 1 else ["green", "red"]
    steps = [
        schema.Threshold(value=value, color=colour)
        for value, colour in zip([None, *limits], colours, strict=False)
    ]
    return dashboard.ThresholdsConfig().mode(schema.ThresholdsMode.ABSOLUTE).steps(steps)
