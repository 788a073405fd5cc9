"""The page: everything that the report says, as one HTML text. Pure but for its style sheet."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from itertools import accumulate
from typing import Any, NamedTuple

from dist_sae.report.charts import (
    Line,
    Mark,
    render_histogram,
    render_lines,
    render_sparkbars,
)
from dist_sae.report.latents import Example, LatentView, Token
from dist_sae.report.shown import duration, shown, time_unit
from dist_sae.telemetry.metrics import DENSITIES, NEVER, PHASES, QUANTILES, STAGES, TABLE, listed

_OTHER_RESULTS = {
    "ce_recovered_mean": (
        "CE recovered, against the mean",
        "The same share, of the harm of mean ablation.",
    ),
    "ce_clean": ("Cross-entropy, model alone", "Nats per token; the site is left alone."),
    "ce_spliced": (
        "Cross-entropy, spliced",
        "Nats per token; the site is replaced by the reconstruction.",
    ),
    "ce_mean": (
        "Cross-entropy, mean ablation",
        "Nats per token; the site is replaced by its mean.",
    ),
    "ce_zero": ("Cross-entropy, zero ablation", "Nats per token; the site is replaced by zero."),
    "never_fired": ("Never fired", "Latents that fired on none of the held-out rows."),
    "tokens": ("Tokens", "Held-out tokens behind the cross-entropies."),
}
"""Results that are no metrics: name and meaning by key."""
_CHARTS = (
    ("Loss and FVU", ("dist_sae_train_loss", "dist_sae_train_fvu"), False),
    ("L0", ("dist_sae_train_l0_latents",), False),
    ("Share of latents", ("dist_sae_train_dead_share", "dist_sae_train_rare_share"), True),
    ("Gradient norm", ("dist_sae_train_gradient_norm",), False),
    ("Learning rate", ("dist_sae_train_learning_rate",), True),
)
"""Charts of training: title, metrics, whether the axis starts at zero."""
_STALLS = {"wait": "waiting for data", "ranks": "with other ranks", "save": "saving"}
"""Phases of a step in which nothing is computed."""
_STALLED = 0.5
"""Share of the time between two reports from which waiting for data is shown as a gap."""
_PALETTE = 6


class Page(NamedTuple):
    """What the report says."""

    title: str
    facts: Sequence[tuple[str, str]]
    """Of the header: what, and its value."""
    run_file: str
    """What a user would write after a command."""
    made_from: str
    """Identifies all that the page is made from."""
    evaluation: Mapping[str, Any] | None
    history: Sequence[Mapping[str, Any]]
    producer_seconds: Mapping[str, float]
    """Summed over the units that exist, by stage."""
    void_settings: Sequence[str]
    """Those that cannot act in this run, and why."""
    latents: Sequence[LatentView]
    latent_rows: int
    """Rows that the examples were looked for in."""
    no_latents: str
    """Why there are no latents to show, or nothing."""


def render_page(page: Page) -> str:
    """The whole report."""
    style = files("dist_sae.report").joinpath("style.css").read_text(encoding="utf-8")
    facts = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in page.facts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="made-from" content="{page.made_from}">'
        f"<title>{escape(page.title)} - dist_sae</title><style>\n{style}</style></head><body>\n"
        f'<header><h1>{escape(page.title)}</h1><dl class="facts">{facts}</dl></header>\n'
        f"<main>{_void_settings(page)}{_numbers(page)}\n{_plots(page)}\n{_latents(page)}</main>\n</body></html>\n"
    )


def _void_settings(page: Page) -> str:
    lines = "".join(f"<li>{escape(line)}</li>" for line in page.void_settings)
    return f"<section><h2>Settings to mind</h2><ul>{lines}</ul></section>\n" if lines else ""


def _numbers(page: Page) -> str:
    head = "<section><h2>Held-out numbers</h2>"
    numbers = page.evaluation
    if numbers is None:
        return f"{head}{_missing('Not measured yet', 'evaluate', page)}</section>"
    cards = "".join(
        f'<div class="card"><b>{metric.title}</b>{_number(metric.short, numbers)}'
        f"<small>{metric.help}</small></div>"
        for metric in listed("card")
        if metric.short in numbers
    )
    details = {m.short: (m.title, m.help) for m in listed("detail")} | _OTHER_RESULTS
    rows = "".join(
        f"<tr><td>{name}</td><td>{_number(key, numbers)}</td><td>{meaning}</td></tr>"
        for key, (name, meaning) in details.items()
        if key in numbers
    )
    measured = f"<p>Measured on data that training never saw, at step {numbers['step']:,}"
    if "hardware" in numbers:
        spent = shown("evaluate_seconds", numbers["evaluate_seconds"])
        measured += f", in {spent} on {escape(numbers['hardware'])}"
    measured += ".</p>"
    if numbers.get("intervals"):
        measured += (
            f"<p>Intervals are of the bootstrap over {numbers['ce_documents']:,} documents.</p>"
        )
    if "ce_left_out" in numbers:
        measured += f"<p>Cross-entropies are left out: {escape(numbers['ce_left_out'])}.</p>"
    elif numbers.get("ce_of") == "masked tokens":
        measured += "<p>Cross-entropies are of masked tokens: each token sees those after it.</p>"
    return f'{head}{measured}<div class="cards">{cards}</div><table>{rows}</table></section>'


def _number(key: str, numbers: Mapping[str, Any]) -> str:
    """Rounded for the eye, whole for programs that read the page."""
    value, interval = numbers[key], numbers.get("intervals", {}).get(key)
    whole = "" if value is None else repr(value)
    number = f'<data id="{key}" value="{whole}">{shown(key, value)}</data>'
    if interval is None:
        return number
    low, high = (shown(key, end) for end in interval)
    return f'{number}<small class="interval">95 %: {low} to {high}</small>'


def _plots(page: Page) -> str:
    figures = [*_history_plots(page), _times(page)]
    if page.evaluation is not None and "density_counts" in page.evaluation:
        figures.append(
            render_histogram(
                "Latent densities",
                page.evaluation["density_log10_edges"],
                page.evaluation["density_counts"],
                x_label="share of held-out rows that a latent fires on",
            )
        )
    elif page.history and "density" in (last := page.history[-1]):
        edges = [float(edge) for edge in DENSITIES if edge != NEVER]
        figures.append(
            render_histogram(
                "Latent densities",
                [*edges, 0.0],
                [last["density"][edge] for edge in DENSITIES if edge != NEVER],
                x_label=f"share of {last['density_rows']:,} rows that a latent fired on",
            )
        )
    missing = "" if page.history else _missing("No history of training yet", "train", page)
    return (
        f'<section><h2>Training</h2>{missing}<div class="plots">{"".join(figures)}</div></section>'
    )


def _history_plots(page: Page) -> Iterator[str]:
    def column(name: str) -> list[float]:
        return [float(record.get(name, float("nan"))) for record in page.history]

    def labelled(name: str, label: str) -> list[float]:
        return [float(record.get(name, {}).get(label, "nan")) for record in page.history]

    def line(name: str, x: list[float], gaps: Sequence[bool] = ()) -> Line:
        return Line(TABLE[name].title, x, column(TABLE[name].short), gaps)

    rows, seconds = column("rows"), column("seconds")
    heldout = None if page.evaluation is None else Mark("Held-out FVU", page.evaluation["fvu"])
    x_label = "rows trained on"
    for title, names, from_zero in _CHARTS:
        yield render_lines(
            title,
            [line(name, rows) for name in names],
            x_label=x_label,
            mark=heldout if "dist_sae_train_fvu" in names else None,
            from_zero=from_zero,
        )
    lines = [
        Line(f"{100 * float(q):.0f} %", rows, labelled("explained_variance", q)) for q in QUANTILES
    ]
    title = TABLE["dist_sae_train_row_explained_variance"].title
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


def _times(page: Page) -> str:
    """Where time went, as one stacked bar for each side."""
    phases: Counter[str] = Counter()
    for record in page.history:
        phases.update(record.get("phases", {}))
    bars = [
        _stack("Trainer", {_STALLS.get(p, p): phases[p] for p in PHASES if p in phases}),
        _stack("Producers", dict(sorted(page.producer_seconds.items(), key=_stage_order))),
    ]
    both = "".join(bars)
    return (
        f'<figure><figcaption>Where time went</figcaption><div class="times">{both}</div></figure>'
        if both
        else ""
    )


def _stage_order(item: tuple[str, float]) -> int:
    return STAGES.index(item[0]) if item[0] in STAGES else len(STAGES)


def _stack(name: str, seconds: Mapping[str, float]) -> str:
    total = sum(seconds.values())
    if not total > 0:
        return ""
    pieces = [(label, s, f"c{i % _PALETTE}") for i, (label, s) in enumerate(seconds.items())]
    parts = "".join(f'<i class="{c}" style="flex:{s / total:.5f}"></i>' for _, s, c in pieces)
    keys = "".join(
        f'<span class="key {c}">{escape(label)} {100 * s / total:.1f} %, {duration(s)}</span>'
        for label, s, c in pieces
    )
    return (
        f'<div><b>{name}</b><div class="stack">{parts}</div><span class="keys">{keys}</span></div>'
    )


def _latents(page: Page) -> str:
    head = "<section><h2>Latents</h2>"
    if not page.latents:
        return f'{head}<p class="missing">{escape(page.no_latents)}</p></section>'
    number = f"{len(page.latents)} latents" if len(page.latents) > 1 else "One latent"
    intro = (
        f"<p>{number}, chosen by the run's seed over the whole range of densities, densest first, "
        f"with the texts among {page.latent_rows:,} rows that activate them most. Colour is the "
        "latent's activation on a token; the outlined token has the activation on the left. Grey "
        "text was outside the model's context. The bars count firings by activation, from 0 to the "
        "maximum.</p>"
    )
    return f"{head}{intro}{''.join(map(_latent, page.latents))}</section>"


def _latent(view: LatentView) -> str:
    examples = "".join(_example(example, view.max_act) for example in view.examples)
    return (
        f'<article class="latent" id="latent-{view.latent}"><div><h3>Latent {view.latent}</h3>'
        f"<small>on {100 * view.density:.3g} % of rows</small>"
        f"<small>{view.firings:,} firings</small><small>max {view.max_act:.4g}</small>"
        f"{render_sparkbars(view.counts)}</div>"
        f'<ol class="examples">{examples}</ol></article>'
    )


def _example(example: Example, max_act: float) -> str:
    where = f"document {example.document}, position {example.position}"
    marked = (_token(t, max_act, peak=i == example.peak) for i, t in enumerate(example.tokens))
    text = f'<span class="text">{"".join(marked)}</span>'
    return f'<li title="{where}"><b>{example.act:.3g}</b>{text}</li>'


def _token(token: Token, max_act: float, *, peak: bool) -> str:
    text = escape(token.text).replace("\n", '<span class="nl">&#8629;</span>')
    if token.act > 0:
        word = text.lstrip(" ") or text  # a line that breaks at the space leaves no colour behind
        strength = f"--a:{0.9 * token.act / max_act:.2f}"
        kind = ' class="peak"' if peak else ""
        space = text.removesuffix(word)
        return f'{space}<mark{kind} style="{strength}" title="{token.act:.4g}">{word}</mark>'
    return text if token.in_context else f'<span class="unseen">{text}</span>'


def _missing(what: str, command: str, page: Page) -> str:
    done = f"<code>dist-sae {command} {escape(page.run_file)}</code>"
    return f'<p class="missing">{what}: run {done}, then make the report again.</p>'
