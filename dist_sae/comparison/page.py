"""The HTML page that compares several runs, from the template `comparison.html`."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from dist_sae.comparison.matched import MatchedLatents
from dist_sae.comparison.runs import NUMBERS, Compared, caveats, differing
from dist_sae.report.charts import Line, render_lines, render_outlines, render_points
from dist_sae.report.outcome import Outcome
from dist_sae.report.page import render_template
from dist_sae.telemetry.metrics import TABLE

_CURVES = ("dist_sae_train_fvu", "dist_sae_train_l0_latents", "dist_sae_train_dead_share")


def render_comparison(
    compared: Sequence[Compared],
    found: Mapping[str, MatchedLatents],
    outcomes: Sequence[Outcome] = (),
) -> str:
    """Render the page.

    Args:
        compared: The runs.
        found: For runs by label, which latents of the first run have a near copy there.
        outcomes: Stored outcomes of `dist-sae analyse` for several of these runs together.
    """
    return render_template(
        "comparison.html",
        compared=compared,
        caveats=caveats(compared),
        differing=differing(compared),
        headings=NUMBERS,
        plots=[Markup(plot) for plot in _plots(compared)],
        matched=found,
        outcomes=outcomes,
        decades=sorted({decade for each in found.values() for decade in each.by_decade}),
    )


def _plots(compared: Sequence[Compared]) -> list[str]:
    evaluated = [each for each in compared if each.evaluation]
    points = [(each.label, each.evaluation["l0"], each.evaluation["fvu"]) for each in evaluated]
    kinds = [each.run.sae.kind for each in evaluated]
    x_label = "latents active on a row"
    plots = [render_points("Held-out FVU over L0", points, x_label=x_label, families=kinds)]
    for name in _CURVES:
        lines = [
            Line(each.label, _column(each, "rows"), _column(each, TABLE[name].short))
            for each in compared
        ]
        plots.append(render_lines(TABLE[name].title, lines, x_label="rows trained on"))
    densities = [(each.label, each.evaluation["density_counts"]) for each in evaluated]
    edges = evaluated[0].evaluation["density_log10_edges"] if evaluated else []
    label = "share of held-out rows that a latent fires on"
    return [*plots, render_outlines("Latents by density", densities, edges, x_label=label)]


def _column(each: Compared, name: str) -> list[Any]:
    return [float(record.get(name, float("nan"))) for record in each.history]
