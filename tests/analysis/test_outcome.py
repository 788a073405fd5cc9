"""How `dist-sae analyse` stores its outcomes next to the run and shows them."""

from argparse import Namespace
from pathlib import Path

import pyarrow as pa
import pytest

from dist_sae.checkpoint.trained import find_checkpoint
from dist_sae.commands.analyse.common import run_analysis
from dist_sae.config import Run
from dist_sae.errors import ConfigError, CorruptObjectError
from dist_sae.report.build import report
from dist_sae.report.charts import Line, render_lines
from dist_sae.report.outcome import (
    Findings,
    Outcome,
    read_outcome_table,
    read_outcomes,
    store_findings,
)
from dist_sae.storage import open_store
from tests.index.indexed import add_checkpoint, produced

FIGURE = render_lines("Falls", [Line("one", [1.0, 100.0], [2.0, 1.0])], x_label="width", log_x=True)
FINDINGS = Findings(
    numbers={"found": 3},
    summary=["three of <four> are found"],
    caveats=["few rows"],
    tables={"concepts": pa.table({"word": ["gold"], "f1": [0.5]})},
    figures=[FIGURE],
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = produced(tmp_path_factory.mktemp("run"))
    add_checkpoint(made)
    return made


def keep(run: Run, findings: Findings = FINDINGS) -> Outcome:
    store = open_store(run.store.runs)
    checkpoint = find_checkpoint(store, run, None)
    assert checkpoint is not None
    checkpoints = {run.name: checkpoint.digest}
    return store_findings(store, run.name, "coverage", "Coverage", checkpoints, {"f1": 1}, findings)


def page(run: Run) -> str:
    return Path(report(run).removeprefix("file://")).read_text()


def test_an_outcome_is_kept_with_a_page_and_shown_by_the_report(run: Run) -> None:
    store = open_store(run.store.runs)
    kept = keep(run)
    assert read_outcomes(store, run.name) == [kept]
    assert (kept.numbers, kept.settings) == ({"found": 3}, {"f1": 1})
    assert read_outcome_table(store, kept, "concepts") == FINDINGS.tables["concepts"]
    own = store.get(f"{run.name}/analysis/coverage/page.html").decode()
    for text in (own, page(run)):
        assert "three of &lt;four&gt; are found" in text
        assert "few rows" in text
        assert FIGURE in text


def test_a_second_outcome_takes_the_place_of_the_first(run: Run) -> None:
    keep(run)
    other = {"concepts": pa.table({"word": ["silver"], "f1": [0.5]})}
    kept = keep(run, FINDINGS._replace(summary=["all are found"], tables=other))
    store = open_store(run.store.runs)
    assert read_outcome_table(store, kept, "concepts") == other["concepts"]
    tables = [key for key in store.keys(f"{run.name}/analysis/") if key.endswith("parquet")]
    assert tables == [kept.tables["concepts"].key]
    (outcome,) = read_outcomes(open_store(run.store.runs), run.name)
    assert outcome.summary == ("all are found",)
    assert "all are found" in page(run)
    assert "three of" not in page(run)


def test_the_report_does_not_show_an_outcome_of_another_checkpoint(tmp_path: Path) -> None:
    run = produced(tmp_path)
    add_checkpoint(run)
    keep(run)
    add_checkpoint(run, step=8, seed=1)
    assert "are found" not in page(run)


def test_findings_are_not_kept_if_a_newer_checkpoint_came_meanwhile(tmp_path: Path) -> None:
    run = produced(tmp_path)
    add_checkpoint(run)

    def find() -> Findings:
        add_checkpoint(run, step=8, seed=1)
        return FINDINGS

    options = Namespace(what="coverage", json=True)
    with pytest.raises(ConfigError, match="a newer checkpoint was saved during the analysis"):
        run_analysis(options, run.name, [run], "Coverage", {}, find)
    assert read_outcomes(open_store(run.store.runs), run.name) == []


def test_a_damaged_outcome_is_named(run: Run) -> None:
    keep(run)
    path = Path(run.store.runs, run.name, "analysis/coverage/outcome.json")
    path.write_text(path.read_text().replace('"found":3', '"found":4'))
    with pytest.raises(CorruptObjectError, match=r"coverage/outcome.json.*analyse again"):
        read_outcomes(open_store(run.store.runs), run.name)
    keep(run)
