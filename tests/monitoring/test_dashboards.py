"""Generated dashboards are up to date, query only existing metrics, and are valid for Grafana."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import promql_parser
import pytest
import yaml

from dist_sae.errors import ConfigError
from dist_sae.telemetry.dashboards import PAGES, render_dashboards
from dist_sae.telemetry.dashboards.queries import (
    Query,
    alive,
    by_rank,
    now,
    pending_pods,
    rate,
    recorded,
    restarts,
    slowest_ranks,
)
from dist_sae.telemetry.metrics import METRICS
from tests.monitoring.files import MONITORING, ROOT, metrics_in, recorded_in, rules
from tests.monitoring.test_rules import promtool

HERE = Path(__file__).parent
VARIABLES = r"\$(namespace|run|rank)"
UNSHOWN = {
    "dist_sae_run_info",  # fills the variables `namespace` and `run`
    "dist_sae_build_info",
    "dist_sae_rank_up",  # for alerts
    "dist_sae_run_finished",
    "dist_sae_run_failed",
    "dist_sae_train_info",
    "dist_sae_train_phase_share",  # for `status`; panels have each rank's shares
    # produce_waited_seconds_total also has the reason for the wait
    "dist_sae_produce_wait_seconds",
    "dist_sae_job_seconds",  # short-lived programs export a single value of it
    "dist_sae_job_end_timestamp_seconds",
    "dist_sae_plan_units",  # trainers and producers export the same number while they run
    "dist_sae_plan_documents",
    "dist_sae_plan_train_rows",
    "dist_sae_evaluate_rows",
}


def expressions() -> list[str]:
    return [
        query.expr
        for page in PAGES
        for panels in page.sections.values()
        for panel in panels
        for query in panel.queries
    ]


def test_the_files_are_what_the_code_gives() -> None:
    script = runpy.run_path(str(ROOT / "launch" / "monitoring.py"))
    for name, text in script["render_monitoring"]().items():
        assert (MONITORING / name).read_text() == text, f"{name}: run launch/render.sh"
    files = {path.name for path in (MONITORING / "dashboards").iterdir()}
    assert files == set(render_dashboards())


def test_grafana_can_tell_panels_and_queries_apart() -> None:
    for page in PAGES:
        panels = json.loads(render_dashboards()[f"{page.name}.json"])["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
        assert len(places) == len(panels)
        for panel in panels:
            letters = [target["refId"] for target in panel.get("targets", [])]
            assert letters == list("ABCD")[: len(letters)], panel["title"]


def test_one_run_is_shown_until_more_are_chosen() -> None:
    for text in render_dashboards().values():
        _, namespace, run, *ranks = json.loads(text)["templating"]["list"]
        assert (run["name"], run["includeAll"], "current" in run) == ("run", False, False)
        assert (namespace["current"]["value"], namespace["allValue"]) == ("$__all", ".*")
        assert [rank["current"]["value"] for rank in ranks] == ["$__all"] * len(ranks)


def test_every_metric_is_shown_once_at_least() -> None:
    shown = "\n".join(expressions())
    recorded = recorded_in(shown)
    asked = metrics_in(shown + "".join(r["expr"] for r in rules() if r["record"] in recorded))
    assert asked | UNSHOWN == {metric.name for metric in METRICS}
    assert not asked & UNSHOWN


def test_the_runbook_names_panels_that_exist() -> None:
    titles = {question for page in PAGES for question in page.sections}
    titles |= {p.title for page in PAGES for panels in page.sections.values() for p in panels}
    plain = (MONITORING / "runbook.md").read_text().replace("**", "")
    named = {name.replace("\n", " ") for name in re.findall(r"\*([^*]+)\*", plain)}
    assert named
    assert named <= titles


def test_every_recorded_series_is_recorded() -> None:
    assert recorded_in("\n".join(expressions())) <= {rule["record"] for rule in rules()}


def test_every_expression_is_promql() -> None:
    for expression in expressions():
        filled = expression.replace("$__rate_interval", "1m").replace("$__range", "1h")
        promql_parser.parse(filled)


def test_a_query_of_what_does_not_exist_is_refused() -> None:
    with pytest.raises(KeyError):
        now("dist_sae_train_fuv")
    with pytest.raises(ValueError, match="is a gauge, not a counter"):
        rate("dist_sae_train_fvu")
    with pytest.raises(ValueError, match="has no label stage"):
        now("dist_sae_train_fvu", "run, stage")


def check_answers(
    folder: Path, series: dict[str, str], answers: dict[Query, dict[str, float]]
) -> None:
    """Check the answers of Prometheus queries at minute 10, with one sample per minute in each
    series.
    """
    cases = [
        {
            "expr": re.sub(VARIABLES, ".*", query.expr.replace("$__rate_interval", "5m")),
            "eval_time": "10m",
            "exp_samples": [{"labels": k, "value": v} for k, v in expected.items()],
        }
        for query, expected in answers.items()
    ]
    given = [{"series": name, "values": values} for name, values in series.items()]
    test = {"interval": "1m", "input_series": given, "promql_expr_test": cases}
    path = folder / "test.yaml"
    path.write_text(yaml.safe_dump({"rule_files": [], "tests": [test]}))
    promtool("test", "rules", path)


@pytest.mark.system
def test_many_ranks_are_shown_as_quantiles_and_the_five_at_the_end(tmp_path: Path) -> None:
    name = "dist_sae_train_loaded_batches"
    series = {f'{name}{{run="few",rank="{n}"}}': f"{n}+0x20" for n in range(3)}
    series |= {f'{name}{{run="many",rank="{n}"}}': f"{n}+0x20" for n in range(21)}

    def lines(run: str, *ranks: int) -> dict[str, float]:
        return {f'{{run="{run}",rank="{n}"}}': n for n in ranks}

    few, median, tail, ends = by_rank(now(name, "run, rank"))
    check_answers(
        tmp_path,
        series,
        {
            few: lines("few", 0, 1, 2),
            median: {'{run="many"}': 10},
            tail: {'{run="many"}': 19},
            ends: lines("many", 16, 17, 18, 19, 20),
        },
    )
    _, _, tail, ends = by_rank(now(name, "run, rank"), lowest=True)
    lowest = {tail: {'{run="many"}': 1.0}, ends: lines("many", 0, 1, 2, 3, 4)}
    check_answers(tmp_path, series, lowest)
    assert [q.legend for q in (median, tail)] == [
        "{{namespace}} {{run}} median",
        "{{namespace}} {{run}} p5",
    ]


@pytest.mark.system
def test_runs_of_one_name_in_two_namespaces_are_two_lines(tmp_path: Path) -> None:
    series, answers = {}, dict[Query, dict[str, float]]()
    start = "dist_sae_process_start_timestamp_seconds"
    phase = "run_phase:dist_sae_train_phase:share5m"
    for space, value in (("x", 1), ("y", 3)):
        of_rank = f'namespace="{space}",run="a",rank="0"'
        series[f"dist_sae_train_fvu{{{of_rank}}}"] = f"{value}+0x20"
        series[f"dist_sae_train_rows_total{{{of_rank}}}"] = f"0+{60 * value}x20"
        series[f'{start}{{{of_rank},role="train"}}'] = "5+0x20"
        series[f'{phase}{{namespace="{space}",run="a",phase="wait"}}'] = f"{value}+0x20"
    lines = [f'{{namespace="{space}",run="a"}}' for space in "xy"]
    answers[now("dist_sae_train_fvu")] = dict(zip(lines, (1.0, 3.0), strict=True))
    answers[rate("dist_sae_train_rows_total")] = dict(zip(lines, (1.0, 3.0), strict=True))
    answers[alive("train")] = dict.fromkeys(lines, 1.0)
    answers[now("dist_sae_train_fvu").over(now("dist_sae_train_fvu"), on="run")] = dict.fromkeys(
        lines, 1.0
    )
    check_answers(tmp_path, series, answers)
    for query in [*answers, recorded(phase, phase="wait")]:
        assert query.legend == "{{namespace}} {{run}}"


def test_every_query_is_of_the_chosen_namespaces() -> None:
    for expression in expressions():
        for selected in re.findall(r"dist_sae_\w+(?::\w+)?{([^}]*)}", expression):
            assert 'namespace=~"$namespace"' in selected, expression
        for grouped in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression):
            assert "namespace" in grouped, expression


@pytest.mark.system
def test_the_slow_rank_is_shown_with_its_node_and_pods_by_part(tmp_path: Path) -> None:
    phase = "dist_sae_train_phase_seconds_total"
    pods = {n: f'namespace="x",pod="a-trainer-0-{n}-abcde"' for n in range(8)}
    series = {
        f'{phase}{{{pod},run="a",rank="{n}",phase="ranks"}}': f"0+{6 * (8 - n)}x20"
        for n, pod in pods.items()
    }
    series |= {f'kube_pod_info{{{pod},node="node-{n}"}}': "1+0x20" for n, pod in pods.items()}
    pending = {f"a-b-producer-0-{n}-abcde": 1 for n in range(2)} | {"a-b-trainer-0-1-abcde": 0}
    info = "run_role_kubernetes_name:dist_sae_run_info:last12h"
    series[f'{info}{{namespace="x",run="a.b",role="produce",kubernetes_name="a-b"}}'] = "1+0x20"
    series |= {
        f'kube_pod_status_phase{{namespace="x",phase="Pending",pod="{pod}"}}': f"{value}+0x20"
        for pod, value in (pending | {"other-1": 1}).items()
    }
    start = "run_role_rank:dist_sae_process_start_timestamp_seconds:max"
    for rank in range(2):
        series[f'{start}{{run="a",role="train",rank="{rank}"}}'] = "5+0x3 9+0x3 17+0x20"
    slow = {
        f'{{{pods[n]},run="a",rank="{n}",node="node-{n}"}}': round(0.1 * (8 - n), 1)
        for n in (3, 4, 5, 6, 7)
    }
    query = slowest_ranks()
    rounded = query._replace(expr=f"round({query.expr}, 0.1)")
    check_answers(
        tmp_path,
        series,
        {
            rounded: slow,
            pending_pods(): {'{namespace="x",kubernetes_name="a-b",part="producer"}': 2},
            restarts(): {'{run="a",role="train"}': 4},
        },
    )


def test_ranks_and_producers_are_shown_of_how_many() -> None:
    numbers = {
        panel.title: panel.queries
        for page in PAGES
        for panels in page.sections.values()
        for panel in panels
        if panel.shape == "number" and len(panel.queries) > 1
    }
    wanted = {title: queries[1].expr for title, queries in numbers.items()}
    assert wanted == {
        "Trainer ranks": now("dist_sae_train_ranks").expr,
        "Producers": now("dist_sae_produce_producers").expr,
        "Live producers": now("dist_sae_produce_producers").expr,
    }


def test_no_panel_draws_a_line_for_each_of_many_ranks() -> None:
    by_ranks = [
        query.expr
        for page in PAGES
        for panels in page.sections.values()
        for panel in panels
        for query in panel.queries
        if "{{rank}}" in query.legend
    ]
    assert len(by_ranks) > 30
    assert [q for q in by_ranks if not re.search(r"(<|>=) 16$|^bottomk", q)] == []


def test_without_the_sdk_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "dist_sae.telemetry.dashboards.grafana", raising=False)
    monkeypatch.setitem(sys.modules, "grafana_foundation_sdk.builders", None)
    with pytest.raises(ConfigError, match=r"pip install '.\[dashboards\]' in the"):
        render_dashboards()


@pytest.mark.system
def test_grafana_s_own_types_take_them(tmp_path: Path) -> None:
    modules = HERE / "node_modules"
    assert modules.is_dir(), "launch/test.sh installs Grafana's types: npm install there"
    (tmp_path / "node_modules").symlink_to(modules)
    (tmp_path / "page.ts").symlink_to(HERE / "page.ts")
    lines = ['import type { Page } from "./page";']
    for page in PAGES:
        text = json.dumps(json.loads(render_dashboards()[f"{page.name}.json"]))
        lines.append(f"export const {page.name}: Page = {text};")
    (tmp_path / "pages.ts").write_text("\n".join(lines))
    command = ["node_modules/.bin/tsc", "--noEmit", "--strict", "--skipLibCheck"]
    command += ["--module", "esnext", "--moduleResolution", "bundler", "--preserveSymlinks"]
    done = subprocess.run(
        [*command, "pages.ts"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[:2000]
