"""The report's page, rendered from `page.html`. Reads no files but its template and style sheet."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dist_sae.report.charts import (
    PALETTE,
    Line,
    ReferenceLine,
    render_histogram,
    render_lines,
    render_sparkbars,
)
from dist_sae.report.formatting import format_duration, format_result, time_unit
from dist_sae.report.latents import LatentView
from dist_sae.report.profile import Profiles, render_profiles
from dist_sae.telemetry.metric import DENSITIES, NEVER, PHASES, QUANTILES, STAGES
from dist_sae.telemetry.metrics import TABLE, listed

if TYPE_CHECKING:
    from dist_sae.report.outcome import Outcome

_OTHER_RESULTS = {
    "ce_recovered_mean": (
        "CE recovered, against the mean",
        "The same share, with mean ablation in place of zero ablation.",
    ),
    "ce_clean": ("Cross-entropy, model alone", "Nats per token; the site is not replaced."),
    "ce_spliced": (
        "Cross-entropy, spliced",
        "Nats per token; the site is replaced by the reconstruction.",
    ),
    "ce_recovered_replacement": (
        "CE recovered, replacement model",
        "Share of zero ablation's harm that is avoided if layers read earlier replacements.",
    ),
    "ce_recovered_mean_replacement": (
        "CE recovered, replacement model, against the mean",
        "The same share, with mean ablation in place of zero ablation.",
    ),
    "ce_replacement": (
        "Cross-entropy, replacement model",
        "Nats per token; each layer reads the replacements of the layers before it.",
    ),
    "ce_mean": (
        "Cross-entropy, mean ablation",
        "Nats per token; the site is replaced by its mean.",
    ),
    "ce_zero": ("Cross-entropy, zero ablation", "Nats per token; the site is replaced by zero."),
    "shared_share": (
        "Shared by both sites",
        "Share of firing latents that write both sites, by the norms of their decoder rows.",
    ),
    "never_fired": ("Never fired", "Latents that fired on none of the held-out rows."),
    "tokens": ("Tokens", "Held-out tokens behind the cross-entropies."),
}
"""Name and meaning of the results that are not metrics, by key."""
_BY_SITE = {
    "fvu": "FVU",
    "ce_recovered": "CE recovered",
    "ce_recovered_mean": "against the mean",
    "ce_spliced": "CE, spliced",
    "ce_mean": "CE, mean",
    "ce_zero": "CE, zero",
    "exclusive_share": "exclusive, by norms",
    "flagged_share": "of these, in both by latent scaling",
}
"""Name of each result per written site, by key."""
_CHARTS = (
    ("Loss and FVU", ("dist_sae_train_loss", "dist_sae_train_fvu"), False),
    ("L0", ("dist_sae_train_l0_latents",), False),
    ("Share of latents", ("dist_sae_train_dead_share", "dist_sae_train_rare_share"), True),
    ("Gradient norm", ("dist_sae_train_gradient_norm",), False),
    ("Learning rate", ("dist_sae_train_learning_rate",), True),
)
"""Charts of training: title, metrics, whether the axis starts at zero."""
_STALLS = {"wait": "waiting for data", "ranks": "in collectives", "save": "saving"}
"""Phases of a step in which nothing is computed, with the names that the page shows."""
_STALLED = 0.5
"""Share of the time between two records of the history above which waiting for data is shown as a
gap."""


class Page(NamedTuple):
    """The content of the report."""

    title: str
    facts: Sequence[tuple[str, str]]
    """Names and values in the header."""
    run_file: str
    """Name of the run file in the commands that the page shows."""
    made_from: str
    """Digest of all inputs of the page."""
    evaluation: Mapping[str, Any] | None
    history: Sequence[Mapping[str, Any]]
    producer_seconds: Mapping[str, float]
    """Seconds by stage of the producers, summed over the existing units."""
    ineffective_settings: Sequence[str]
    """Settings that have no effect in this run, each with the reason."""
    latents: Sequence[LatentView]
    left_out: Sequence[str]
    """Parts that the index lacks, each with the reason."""
    latent_rows: int
    """Number of rows in the index."""
    no_latents: str
    """Why no latents are shown, or why they have no texts; otherwise empty."""
    profiles: Profiles | None = None
    """Profiles of the latents that fire, if several sites are written."""
    outcomes: "Sequence[Outcome]" = ()
    """Outcomes of `dist-sae analyse`."""


def render_page(page: Page) -> str:
    """Render the page."""
    return render_template(
        "page.html",
        page=page,
        numbers=page.evaluation,
        intervals=(page.evaluation or {}).get("intervals") or {},
        by_site=_by_site(page.evaluation or {}),
        site_columns=_BY_SITE,
        listed=listed,
        details={m.short: (m.title, m.help) for m in listed("detail")} | _OTHER_RESULTS,
        curves=map(Markup, _history_plots(page)),
        times=_times(page),
        densities=Markup(_densities(page)),
        profiles=Markup(render_profiles(page.profiles) if page.profiles else ""),
        palette=PALETTE,
        href=_hrefs(page),
    )


def _hrefs(page: Page) -> Callable[[int], str]:
    there = {view.page.latent for view in page.latents}
    return lambda latent: f"#latent-{latent}" if latent in there else ""


def render_template(name: str, **content: Any) -> str:
    """Render a template of this folder. The template gets the style sheet as `style`."""
    environment, style = _templates()
    return environment.get_template(name).render(style=style, **content)


@cache
def _templates() -> tuple[Environment, Markup]:
    """Load the templates, which are compiled once, and the style sheet."""
    environment = Environment(
        loader=PackageLoader("dist_sae.report", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "format_duration": format_duration,
        "marked": lambda text: Markup('<span class="nl">&#8629;</span>').join(text.split("\n")),
        "format_result": lambda value, key: format_result(key, value),
        "sparkbars": lambda counts: Markup(render_sparkbars(counts)),
    }
    style = files("dist_sae.report").joinpath("style.css").read_text(encoding="utf-8")
    return environment, Markup(style)


def _by_site(evaluation: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the results of each written site, if there are several."""
    losses, latents = (evaluation.get(f"{name}_by_site", {}) for name in ("ce", "latents"))
    fvus = evaluation.get("fvu_by_site", {})
    return {
        site: {"fvu": fvu, **losses.get(site, {}), **latents.get(site, {})}
        for site, fvu in fvus.items()
    }


def _densities(page: Page) -> str:
    if page.evaluation is not None and "density_counts" in page.evaluation:
        return render_histogram(
            "Latent densities",
            page.evaluation["density_log10_edges"],
            page.evaluation["density_counts"],
            x_label="share of held-out rows that a latent fires on",
        )
    if page.history and "density" in (last := page.history[-1]):
        edges = [float(edge) for edge in DENSITIES if edge != NEVER]
        return render_histogram(
            "Latent densities",
            [*edges, 0.0],
            [last["density"][edge] for edge in DENSITIES if edge != NEVER],
            x_label=f"share of {last['density_rows']:,} rows that a latent fired on",
        )
    return ""


def _history_plots(page: Page) -> Iterator[str]:
    def column(name: str) -> list[float]:
        return [float(record.get(name, float("nan"))) for record in page.history]

    def labelled(name: str, label: str) -> list[float]:
        return [float(record.get(name, {}).get(label, "nan")) for record in page.history]

    def line(name: str, x: list[float], gaps: Sequence[bool] = ()) -> Line:
        return Line(TABLE[name].title, x, column(TABLE[name].short), gaps)

    rows, seconds = column("rows"), column("seconds")
    heldout = (
        None if page.evaluation is None else ReferenceLine("Held-out FVU", page.evaluation["fvu"])
    )
    x_label = "rows trained on"
    for title, names, from_zero in _CHARTS:
        yield render_lines(
            title,
            [line(name, rows) for name in names],
            x_label=x_label,
            reference=heldout if "dist_sae_train_fvu" in names else None,
            from_zero=from_zero,
        )
    lines = [
        Line(f"{100 * float(q):.0f} %", rows, labelled("explained_variance", q)) for q in QUANTILES
    ]
    title = TABLE["dist_sae_train_row_explained_variance"].title
    yield render_lines(title, lines, x_label=x_label)
    prefixes = {name: None for record in page.history for name in record.get("prefix_fvu", {})}
    if prefixes:
        lines = [Line(f"{int(p):,}", rows, labelled("prefix_fvu", p)) for p in prefixes]
        title = TABLE["dist_sae_train_prefix_fvu"].title
        yield render_lines(title, lines, x_label=x_label)
    lines = [line("dist_sae_train_product_share", rows)]
    for phase, name in _STALLS.items():
        spent = zip(labelled("phases", phase), seconds, strict=True)
        lines.append(Line(name, rows, [part / whole for part, whole in spent]))
    yield render_lines("Share of a step", lines, x_label=x_label, from_zero=True)
    size, unit = time_unit(sum(seconds))
    times = [total / size for total in accumulate(seconds)]
    waited = zip(labelled("phases", "wait"), seconds, strict=True)
    stalls = [part > _STALLED * whole for part, whole in waited]
    speed = [
        line("dist_sae_train_rows_per_second", times, stalls),
        line("dist_sae_train_worked_rows_per_second", times, stalls),
    ]
    yield render_lines(
        "Rows per second", speed, x_label=f"time in training, {unit}", from_zero=True
    )


def _times(page: Page) -> dict[str, dict[str, float]]:
    """Sum the seconds spent on each part of the work, for the trainer and the producers."""
    phases: Counter[str] = Counter()
    for record in page.history:
        phases.update(record.get("phases", {}))
    times: dict[str, dict[str, float]] = {
        "Trainer": {_STALLS.get(p, p): phases[p] for p in PHASES if p in phases},
        "Producers": dict(sorted(page.producer_seconds.items(), key=_stage_order)),
    }
    return {name: seconds for name, seconds in times.items() if sum(seconds.values()) > 0}


def _stage_order(item: tuple[str, float]) -> int:
    return STAGES.index(item[0]) if item[0] in STAGES else len(STAGES)
