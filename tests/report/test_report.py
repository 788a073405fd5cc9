import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.config import Run
from dist_sae.config.fingerprint import run_fingerprint
from dist_sae.data.plan import Plan, load_plan
from dist_sae.data.shard import SiteRows, UnitManifest, manifest_key, write_shard
from dist_sae.index.query import CoactiveLatent, LatentPage, NearestLatent
from dist_sae.index.texts import Example, Token
from dist_sae.producing.planner import plan
from dist_sae.report.build import report
from dist_sae.report.charts import Line, ReferenceLine, render_lines, short_number
from dist_sae.report.formatting import format_result
from dist_sae.report.latents import LatentView, choose_latents
from dist_sae.report.page import Page, render_page
from dist_sae.storage import open_store
from dist_sae.storage.records import seal
from dist_sae.telemetry.metric import DENSITIES
from tests.index.indexed import make_index
from tests.world import save

EVALUATION: dict[str, Any] = {
    "step": 7,
    "rows": 12_345,
    "fvu": 0.2037769531803247,
    "l0": 3.875,
    "dead_share": 0.015625,
    "pca_fvu": 0.7134222661591287,
    "pca_components": 2,
    "ce_clean": 3.1415926535,
    "ce_spliced": 3.4,
    "ce_zero": 9.25,
    "ce_mean": 8.5,
    "ce_recovered": 0.9577,
    "ce_recovered_mean": 0.9518,
    "tokens": 4096,
    "density_log10_edges": [-3.0, -2.0, -1.0, 0.0],
    "density_counts": [1, 2, 0],
    "never_fired": 5,
}


class Elements(HTMLParser):
    """All elements of a page, as (tag, attributes, text)."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = (tag, dict(attrs), list[str]())
        self.found.append(element)
        if tag not in {"meta", "circle", "line", "rect"}:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        for _, _, text in self._open:
            text.append(data)

    def all(self, tag: str, kind: str | None = None) -> list[tuple[dict[str, str | None], str]]:
        return [
            (a, "".join(t)) for n, a, t in self.found if n == tag and kind in (None, a.get("class"))
        ]


def make_page(evaluation: dict[str, Any] | None = None, latents: Sequence[LatentView] = ()) -> Page:
    history = [
        {
            "step": s,
            "rows": 100 * s,
            "seconds": 2.0,
            "wait_seconds": 0.5,
            "fvu": 1 / s,
            "loss": 2 / s,
            "phases": {"wait": 0.5, "forward": 1.5},
        }
        for s in (1, 2, 4)
    ]
    return Page(
        title="<b>run</b>",
        facts=[("Model", "a&b")],
        run_file="RUN.yaml",
        made_from="these numbers",
        evaluation=evaluation,
        history=history,
        producer_seconds={"forward": 3.0, "tokenize": 1.0},
        ineffective_settings=["sae.x: <never>"],
        latents=latents,
        left_out=["nearest latents (a <reason>)"],
        latent_rows=10,
        no_latents="none <here>",
    )


def one_latent(texts: Sequence[str], acts: Sequence[float], peak: int) -> LatentView:
    tokens = [Token(text, act, in_context=True) for text, act in zip(texts, acts, strict=True)]
    page = LatentPage(
        latent=3,
        firings=9,
        density=0.25,
        mean=1.0,
        max=max(acts),
        deciles=(1.0,) * 9,
        histogram=(9,),
        decoder_norm=1.0,
        encoder_norm=1.0,
        encoder_bias=0.0,
        nearest=(NearestLatent(3, 0.875), NearestLatent(8, 0.5)),
        top_tokens=(),
        bottom_tokens=(),
        examples=(),
        coactive=(CoactiveLatent(9, 5, 1.0, 0.25),),
        norms={},
    )
    example = Example(acts[peak], 0, peak, tokens, peak)
    return LatentView(page, 0.75, [example], {}, [(" up<b>", 2.0)], [(" down", -1.0)], [])


def test_page_escapes_html_in_texts_and_facts() -> None:
    view = one_latent(["<script>alert(1)</script>", ' a"&b'], [2.0, 0.0], 0)
    page = render_page(make_page(latents=[view]))
    assert "<script" not in page
    assert "<b>run</b>" not in page
    elements = Elements(page)
    assert elements.all("span", "text")[0][1] == '<script>alert(1)</script> a"&b'
    assert elements.all("h1")[0][1] == "<b>run</b>"
    assert "none <here>" in Elements(render_page(make_page())).all("p", "missing")[1][1]


def test_page_tells_of_settings_that_cannot_act_and_of_numbers_that_nobody_knows_yet() -> None:
    page = Elements(render_page(make_page(EVALUATION | {"dead_share": None})))
    assert page.all("li")[0][1] == "sae.x: <never>"
    assert ({"id": "dead_share", "value": ""}, "not known yet") in page.all("data")


def test_page_shows_the_numbers_of_the_evaluation() -> None:
    shown = {
        a["id"] or "": a["value"]
        for a, _ in Elements(render_page(make_page(EVALUATION))).all("data")
    }
    left_out = {"step", "pca_components", "density_log10_edges", "density_counts"}
    assert shown.keys() == EVALUATION.keys() - left_out
    assert {name: json.loads(value or "") for name, value in shown.items()} == {
        name: EVALUATION[name] for name in shown
    }


@pytest.mark.parametrize(
    ("name", "text"),
    [("fvu", "0.2038"), ("dead_share", "1.56 %"), ("ce_recovered", "95.77 %"), ("rows", "12,345")],
)
def test_page_rounds_a_number_for_the_eye(name: str, text: str) -> None:
    elements = Elements(render_page(make_page(EVALUATION)))
    assert [t for a, t in elements.all("data") if a["id"] == name] == [text]


def test_page_says_which_command_measures_when_evaluation_is_missing() -> None:
    elements = Elements(render_page(make_page()))
    assert "run dist-sae evaluate RUN.yaml" in elements.all("p", "missing")[0][1]
    assert not elements.all("data")


def test_page_outlines_the_token_of_the_example_and_colours_by_activation() -> None:
    view = one_latent([" a", " b", " c", " d"], [1.0, 0.0, 4.0, 2.0], 2)
    marks = Elements(render_page(make_page(latents=[view]))).all("mark")
    assert [text for _, text in marks] == ["a", "c", "d"]  # " b" is not active
    assert [text for attributes, text in marks if attributes.get("class") == "peak"] == ["c"]
    assert Elements(render_page(make_page(latents=[view]))).all("span", "text")[0][1] == " a b c d"
    strengths = [float((a["style"] or "").removeprefix("--a:")) for a, _ in marks]
    # 0.9 at the maximum and linear below it: 1/4, 4/4 and 2/4 of 0.9, to two digits
    assert strengths == pytest.approx([0.225, 0.9, 0.45], abs=0.0051)


def test_page_says_what_a_latent_is_near_to_and_what_it_raises() -> None:
    page = render_page(make_page(latents=[one_latent([" a"], [1.0], 0)]))
    elements = Elements(page)
    assert [text for _, text in elements.all("span", "word")] == [" up<b>", " down"]
    found = {
        key: " ".join(value.split())
        for (_, key), (_, value) in zip(elements.all("dt")[1:], elements.all("dd")[1:], strict=True)
    }
    assert found["nearest"] == "3 0.88 8 0.50"
    assert found["coactive"] == "9 0.25"
    assert [(a["href"], text) for a, text in elements.all("a")] == [("#latent-3", "3")]
    assert "denser than 75 % of latents" in page


def test_page_is_one_file() -> None:
    page = render_page(make_page(EVALUATION))
    assert not re.search(r"<(link|script|img|iframe)|@import|url\(|https?://", page)


def test_page_draws_what_training_said_of_rows_and_latents() -> None:
    said = {
        "rare_share": 0.25,
        "product_share": 0.5,
        "explained_variance": {"0.05": 0.1, "0.5": 0.75},
        "density": dict.fromkeys(DENSITIES, 0) | {"-2.0": 3, "never": 4},
        "density_rows": 5000,
    }
    page = make_page()
    page = page._replace(history=[{**record, **said} for record in page.history])
    elements = Elements(render_page(page))
    titles = {text for _, text in elements.all("title")}
    assert {"5 %: last 0.1", "50 %: last 0.75", "Rarely firing latents: last 0.25"} <= titles
    assert {"Encoder product: last 0.5", "waiting for data: last 0.25"} <= titles
    # half a decade from 10 ** -2; the 4 latents that never fired are in no bar
    assert "3 latents, 0.01 to 0.032" in titles
    assert "share of 5,000 rows that a latent fired on" in render_page(page)
    # the evaluation's histogram is finer, and of held-out rows
    measured = render_page(page._replace(evaluation=EVALUATION))
    assert "share of held-out rows that a latent fires on" in measured
    assert "of 5,000 rows" not in measured


def test_page_divides_time_by_stage() -> None:
    spans = Elements(render_page(make_page())).all("span")
    keys = [t for a, t in spans if (a.get("class") or "").startswith("key ") and " %, " in t]
    # trainer: 3 records of 2 s, of which .5 s each is waiting; producers: stages in their order
    assert keys == [
        "waiting for data 25.0 %, 1.5 s",
        "forward 75.0 %, 4.5 s",
        "tokenize 25.0 %, 1 s",
        "forward 75.0 %, 3 s",
    ]


def test_a_stall_is_a_gap_in_the_curve_over_time() -> None:
    """The second report waited for most of its time, so no line joins it to the first."""
    times = [1.0, 9.0, 10.0, 11.0]
    whole = render_lines("t", [Line("a", times, [4, 1, 4, 4])], x_label="x")
    broken = [False, True, False, False]
    pieces = render_lines("t", [Line("a", times, [4, 1, 4, 4], broken)], x_label="x")
    assert (whole.count("<polyline"), pieces.count("<polyline")) == (1, 1)
    (line,) = re.findall(r'<polyline[^>]* points="([^"]*)"', pieces)
    assert len(line.split()) == 3  # the other piece is a dot
    assert pieces.count('<circle class="dot') == whole.count('<circle class="dot') + 1
    page = make_page()
    stalled = [{**r, "rows_per_second": 5.0, "seconds": 4.0} for r in page.history]
    stalled[1] = stalled[1] | {"phases": {"wait": 3.0, "forward": 1.0}}
    drawn = render_page(page._replace(history=stalled))
    assert drawn.count("<title>All time: last 5</title>") == 2  # one of a dot, and one of a line


def test_an_evaluation_shows_its_intervals_and_its_machine() -> None:
    found = EVALUATION | {"intervals": {"ce_recovered": [0.95, 0.9612]}, "ce_documents": 64}
    found |= {"hardware": "a <processor>", "evaluate_seconds": 90.0}
    page = render_page(make_page(found))
    assert "95 %: 95.00 % to 96.12 %" in page
    assert "at step 7, in 90 s on a &lt;processor&gt;." in page
    assert "bootstrapped over 64 documents" in page


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("rows", 1234567, "1,234,567"),
        ("fvu", 0.203776, "0.2038"),
        ("dead_share", None, "not known yet"),
        ("ce_clean", 3.14159, "3.142 nats"),
        ("evaluate_seconds", 7380.0, "2.05 h"),
        ("bytes", 8704000.0, "8.7 MB"),
        ("rows_per_second", 12345.6, "12,346 rows/s"),
        ("loss", 1234567.8, "1,234,568"),
        ("report", "/runs/r.html", "/runs/r.html"),
    ],
)
def test_results_are_shown_with_units_and_separators(name: str, value: Any, text: str) -> None:
    assert format_result(name, value) == text


def test_lines_place_the_mark_at_its_value() -> None:
    figure = render_lines(
        "t", [Line("a", [0, 1], [0.0, 10.0])], x_label="x", reference=ReferenceLine("m", 5.0)
    )
    svg = Elements(figure)
    points = next(a["points"] for a, _ in svg.all("polyline")) or ""
    (y_low, y_high) = (float(point.split(",")[1]) for point in points.split())
    (mark,) = (float(a["y1"] or "") for a, _ in svg.all("line", "mark"))
    # coordinates are rounded to a tenth of a unit
    assert mark == pytest.approx((y_low + y_high) / 2, abs=0.11)


def test_a_logarithmic_x_axis_has_equal_steps_between_powers_of_ten() -> None:
    line = Line("a", [1e-4, 1e-3, 1e-2], [0.0, 1.0, 2.0])
    figure = render_lines("t", [line], x_label="x", log_x=True)
    (points,) = re.findall(r'<polyline class="line c0" points="([^"]*)"', figure)
    x = [float(point.split(",")[0]) for point in points.split()]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert re.findall(r"<tspan[^>]*>(-\d)</tspan>", figure) == ["-4", "-3", "-2"]
    # an axis between two powers of ten shows both
    narrow = render_lines("t", [line._replace(x=[2e-3, 3e-3, 4e-3])], x_label="x", log_x=True)
    assert re.findall(r"<tspan[^>]*>(-\d)</tspan>", narrow) == ["-3", "-2"]


def test_lines_leave_out_values_that_are_not_finite() -> None:
    figure = render_lines("t", [Line("a", [0, 1, 2], [1.0, float("nan"), 3.0])], x_label="x")
    assert "nan" not in figure
    assert len((Elements(figure).all("polyline")[0][0]["points"] or "").split()) == 2


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.5e6, "1.5M"), (250_000, "250k"), (0.02, "0.02"), (3e-5, "3e-5")],
)
def test_short_is_short(value: float, text: str) -> None:
    assert short_number(value) == text


def test_chosen_latents_fire_and_span_the_densities() -> None:
    counts = np.array([0, 3, 10, 10, 10, 100, 1000, 10_000])
    chosen = choose_latents(counts, 4, seed=0)
    assert [int(counts[latent]) for latent in chosen] == [10_000, 1000, 100, 10]
    assert chosen == choose_latents(counts, 4, seed=0)
    # 0 and 3 firings are too few; all others are chosen if more are requested than exist
    assert sorted(choose_latents(counts, 50, seed=0)) == [2, 3, 4, 5, 6, 7]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.model_validate(
        {
            "name": "tiny",
            "store": {"activations": str(tmp_path / "a"), "runs": str(tmp_path / "r")},
            "model": {"kind": "synthetic", "d_in": 4, "n_features": 8, "l0": 1},
            "corpus": {"kind": "synthetic", "documents": 8, "document_rows": 16},
            "activations": {
                "sites": ["synthetic"],
                "streams": 1,
                "unit_rows": 64,
                "context_tokens": 8,
                "dtype": "fp32",
            },
            "sae": {"kind": "topk", "n_latents": 4, "k": 1, "auxk": 0},
            "train": {"rows": 16, "batch_rows": 16},
        }
    )


def store_unit(run: Run, made: Plan, unit: int) -> None:
    """Store a shuffled unit in which latent d has activation 1 + position wherever position % 4 =
    d.
    """
    store = open_store(run.store.activations)
    documents = torch.tensor([span.first for span in made.units[unit]]).repeat_interleave(16)
    positions = torch.arange(16).repeat(len(made.units[unit]))
    acts = torch.eye(4)[positions % 4] * (1 + positions)[:, None]
    rows = SiteRows(acts, (16 * documents + positions).int(), positions.int(), documents)
    rows = rows.take(torch.randperm(len(positions), generator=torch.Generator().manual_seed(0)))
    manifest = UnitManifest(
        plan=made.hash,
        unit=unit,
        producer="test",
        documents=len(made.units[unit]),
        rows=len(positions),
        excluded={},
        seconds={"forward": 1.0},
        sites={"synthetic": write_shard(store, unit, "synthetic", rows, 32, "fp32")},
    )
    store.put(manifest_key(unit), seal(manifest))


def save_identity(run: Run) -> None:
    eye, zero = torch.eye(4), torch.zeros(4)
    tensors = {"W_enc": eye, "W_dec": eye, "b_enc": zero, "b_dec": zero, "idle_rows": zero}
    made = load_plan(open_store(run.store.activations), run)
    scalars = {"scale": 0.5, "mean": [0.0] * 4, "variance": 1.0, "rows": 1}
    scalars |= {"plan": made.hash, "run": run_fingerprint(run)}
    save(Checkpoints(open_store(run.store.runs), run.name, 1), 1, tensors, scalars)


def test_report_outlines_the_row_with_the_highest_activation(run: Run) -> None:
    made = plan(run)
    for unit in range(len(made.units)):
        store_unit(run, made, unit)
    save_identity(run)
    without = Path(report(run)).read_text()
    assert "No latent index of this checkpoint: run dist-sae index RUN.yaml" in without
    make_index(run)
    place = Path(report(run))
    assert place == Path(run.store.runs) / "tiny" / "report" / "report.html"
    elements = Elements(place.read_text())
    peaks = [(int(text), a["title"]) for a, text in elements.all("mark", "peak")]
    assert peaks
    for token, act in peaks:
        # the token is 16 * document + position. Latent d is the most active at its last position,
        # 12 + d, where its activation is (13 + d) times the scale of .5
        assert token % 16 in range(12, 16)
        assert act == f"{0.5 * (1 + token % 16):.4g}"
    # contexts have 8 tokens, so the model did not see the first half of the document
    unseen = [int(text) % 16 for _, text in elements.all("span", "unseen")]
    assert unseen
    assert max(unseen) < 8


def test_report_says_what_is_missing_before_anything_ran(run: Run) -> None:
    plan(run)
    missing = Elements(Path(report(run)).read_text()).all("p", "missing")
    # messages for the numbers, the curves and the latents, in the order of the page
    assert [re.findall(r"dist-sae (\w+)", text) for _, text in missing] == [
        ["evaluate", "report"],
        ["train", "report"],
        ["train", "report"],
    ]


@pytest.mark.parametrize(
    ("sae", "shown"),
    [
        ({"kind": "topk", "k": 2, "auxk": 0}, "k = 2"),
        ({"kind": "jumprelu", "sparsity": 1e-4}, "sparsity = 0.0001"),
        ({"kind": "jumprelu", "target_l0": 1.5}, "target_l0 = 1.5"),
        ({"kind": "jumprelu_tanh"}, "sparsity by default"),
    ],
)
def test_report_names_what_makes_the_dictionary_sparse(
    run: Run, sae: dict[str, Any], shown: str
) -> None:
    run = Run.model_validate(run.model_dump() | {"sae": {"n_latents": 4, **sae}})
    plan(run)
    page = Path(report(run)).read_text().replace("\u00a0", " ")
    assert f"<dd>{sae['kind']}, 4 latents, {shown}</dd>" in page


def test_report_needs_neither_units_nor_the_dictionary(run: Run) -> None:
    plan(run)
    save_identity(run)
    for path in Path(run.store.runs).rglob("W_*.safetensors"):
        path.unlink()
    said = Elements(Path(report(run)).read_text()).all("p", "missing")[-1][1]
    assert "dist-sae index" in said
