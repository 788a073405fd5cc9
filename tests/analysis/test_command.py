"""`dist-sae analyse` on one run, from the command line."""

import json
from pathlib import Path

import pytest

from dist_sae.commands.cli import main
from dist_sae.report.outcome import read_outcome_table, read_outcomes
from dist_sae.storage import open_store
from tests.index.indexed import add_checkpoint, make_index, produced


@pytest.mark.parametrize(("what", "table"), [("manifolds", "groups"), ("map", "clusters")])
def test_an_answer_is_printed_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, table: str
) -> None:
    run = produced(tmp_path)
    add_checkpoint(run)
    make_index(run)
    folder = str(Path(run.store.runs, run.name))
    assert main(["analyse", what, folder, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    (outcome,) = read_outcomes(open_store(run.store.runs), run.name)
    assert outcome.what == what
    assert printed.items() >= outcome.numbers.items()
    read_outcome_table(open_store(run.store.runs), outcome, table)
    page = Path(printed["page"]).read_text()
    assert all(line.split('"')[0].split("'")[0] in page for line in outcome.summary)
