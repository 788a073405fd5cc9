"""Generated dashboards: up to date, of existing metrics, and valid for Grafana."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import promql_parser
import pytest

from dist_sae.errors import ConfigError
from dist_sae.telemetry.dashboards import PAGES, render_dashboards
from dist_sae.telemetry.dashboards.queries import now, rate
from dist_sae.telemetry.metrics import METRICS
from tests.monitoring.files import MONITORING, ROOT, metrics_in, recorded_in, rules

HERE = Path(__file__).parent
UNSHOWN = {
    "dist_sae_run_info",  # fills the variable `run`
    "dist_sae_build_info",
    "dist_sae_rank_up",  # for alerts
    "dist_sae_run_finished",
    "dist_sae_run_failed",
    "dist_sae_train_info",
    "dist_sae_produce_wait_seconds",  # produce_waited_seconds_total says for whom as well
    "dist_sae_job_seconds",  # of short-lived programs: one value each
    "dist_sae_job_end_timestamp_seconds",
    "dist_sae_plan_units",  # trainers and producers say the same as long as they live
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
        _, run, *ranks = json.loads(text)["templating"]["list"]
        assert (run["name"], run["includeAll"], "current" in run) == ("run", False, False)
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
