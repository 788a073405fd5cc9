"""`dist-sae compare` as a user runs it, on small runs of one activation set."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_sae import logs
from dist_sae.checkpoint.trained import find_checkpoint
from dist_sae.commands import cli
from dist_sae.comparison.matched import match_latents
from dist_sae.config import Run
from dist_sae.dictionaries.base import Dictionary
from dist_sae.errors import ConfigError
from dist_sae.evaluation.evaluate import evaluate
from dist_sae.report.charts import render_points
from dist_sae.report.outcome import Findings, store_findings
from dist_sae.storage import open_store
from dist_sae.telemetry.history import History
from tests.index.indexed import add_checkpoint, make_index, produced


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A trained, evaluated and indexed run."""
    run = produced(tmp_path_factory.mktemp("compare"))
    add_checkpoint(run)
    write_history(
        run, {"step": 1, "rows": 64, "fvu": 0.75, "seconds": 2.0}, {"step": 3, "seconds": 4.0}
    )
    evaluate(run)
    make_index(run)
    return run


def beside(run: Run, name: str, **sae: Any) -> Run:
    """A run on the same activations with other settings."""
    return run.model_copy(update={"name": name, "sae": run.sae.model_copy(update=sae)})


def write_history(run: Run, *records: dict[str, Any]) -> None:
    history = History(open_store(run.store.runs), run.name, 0)
    for record in records:
        history.append(record)
    history.flush()


def folder(run: Run) -> str:
    return f"{run.store.runs}/{run.name}"


def keep_joint_outcomes(first: Run, other: Run) -> None:
    """Return outcomes of both runs, of both with another checkpoint, and of the first alone."""
    store = open_store(first.store.runs)
    names = (first.name, other.name)
    found = [find_checkpoint(store, run, None) for run in (first, other)]
    newest = {name: each.digest for name, each in zip(names, found, strict=True) if each}
    cases = {
        "Of both": newest,
        "Of older checkpoints": newest | {other.name: "0"},
        "Of one": {first.name: newest[first.name]},
    }
    for title, checkpoints in cases.items():
        what = title.lower().replace(" ", "-")
        store_findings(store, first.name, what, title, checkpoints, {}, Findings({}, ["."]))


def compare(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """Run the command and return stdout, or stderr if a failure is expected."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "configure", lambda **_: None)
        assert cli.main(["compare", *arguments]) == code
    said = capsys.readouterr()
    return said.err if code else said.out


@pytest.mark.system
def test_numbers_stand_beside_the_settings_that_differ(
    first: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = beside(first, "sparse", k=3)
    add_checkpoint(other, seed=1)
    found = evaluate(other)
    table, page = tmp_path / "table.csv", tmp_path / "page.html"
    keep_joint_outcomes(first, other)
    said = compare(
        capsys, folder(first), folder(other), "--json", "--csv", str(table), "--html", str(page)
    )
    content = json.loads(said)
    assert [row["run"] for row in content["runs"]] == ["world", "sparse"]
    assert [row["sae.k"] for row in content["runs"]] == [5, 3]
    assert "sae.auxk" not in content["runs"][0]
    assert content["runs"][1]["fvu"] == found["fvu"]
    assert content["runs"][0]["trained_rows"] == 3 * 64
    assert content["runs"][0]["rows_per_second"] == 3 * 64 / 6
    assert content["runs"][1]["rows_per_second"] is None  # this run has no history
    assert content["caveats"] == []
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["sae.k"] for row in rows] == ["5", "3"]
    assert float(rows[1]["fvu"]) == found["fvu"]
    text = page.read_text()
    assert f'<data value="{found["fvu"]}">' in text
    assert text.count('<circle class="dot') >= 2  # one point per run
    assert "<td>sae.k</td><td>5</td><td>3</td>" in text
    assert "Of both" in text
    assert "Of older checkpoints" not in text
    assert "Of one" not in text


def test_a_terminal_shows_which_runs_have_which_value(
    first: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"a": 3, "b": 4, "c": 3}
    for name, k in names.items():
        add_checkpoint(beside(first, name, k=k))
    runs = [f"{first.store.runs}/{name}" for name in names]
    lines = compare(capsys, *runs).splitlines()
    assert lines[0].split()[:3] == ["run", "Step", "Rows"]
    assert "  sae.k: 3 (a, c); 4 (b)" in lines
    assert f"a: has not been evaluated; run dist-sae evaluate {runs[0]}." in lines


def test_numbers_that_are_not_of_the_same_rows_are_marked(
    first: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    other = beside(first, "fewer")
    add_checkpoint(other)
    evaluate(other.model_copy(update={"evaluate": other.evaluate.model_copy(update={"rows": 100})}))
    (caveat,) = json.loads(compare(capsys, folder(first), folder(other), "--json"))["caveats"]
    assert caveat.startswith("Held-out numbers were measured on different rows: world on ")
    assert "fewer on 100 rows of synthetic" in caveat


def test_an_evaluation_of_an_older_checkpoint_is_marked(
    first: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    other = beside(first, "trained-on")
    add_checkpoint(other)
    evaluate(other)
    add_checkpoint(other, step=5)
    (caveat,) = json.loads(compare(capsys, folder(first), folder(other), "--json"))["caveats"]
    assert caveat.startswith("trained-on: was evaluated at step 3 of 5; run dist-sae evaluate ")


def test_latents_with_a_near_copy_are_counted_by_frequency(first: Run) -> None:
    """Only dead latents are copied; the others get their own directions."""

    def new_directions(sae: Dictionary) -> None:
        n_alive = len(sae.b_enc) - 5
        rows = torch.randn(n_alive, 16, generator=torch.Generator().manual_seed(7))
        sae.W_dec.data[:n_alive] = torch.nn.functional.normalize(rows, dim=1)

    other = beside(first, "new")
    add_checkpoint(other, change=new_directions)
    found = match_latents(first, other)
    assert found.share == 5 / 64
    assert set(found.by_decade.values()) == {0.0}  # latents that fire
    same = match_latents(first, first)
    assert same.share == 1
    assert set(same.by_decade.values()) == {1.0}
    assert match_latents(other, first) == (5 / 64, {})  # this run has no index


def test_runs_that_write_other_sites_cannot_be_matched(first: Run) -> None:
    other = first.model_copy(
        update={"name": "elsewhere", "sae": first.sae.model_copy(update={"writes": ("other",)})}
    )
    with pytest.raises(ConfigError, match="world writes synthetic and elsewhere writes other"):
        match_latents(first, other)


def test_a_page_of_many_runs_repeats_its_colours(
    first: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    compare(capsys, *[folder(first)] * 9, "--html", str(page))
    used = set(re.findall(r'class="key (c\d)"', page.read_text()))
    assert used == {f"c{number}" for number in range(8)}


def test_a_folder_without_a_run_is_named(
    first: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = compare(capsys, folder(first), str(tmp_path), code=2)
    assert said.startswith(f"error: {tmp_path}: has no run.yaml")


def test_a_file_that_cannot_be_written_is_named(
    first: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in ("--csv", "--html"):
        path = tmp_path / "missing" / "file"
        said = compare(capsys, folder(first), folder(first), option, str(path), code=2)
        assert said == (
            f"error: {option}: {path}: No such file or directory; choose a file that can be "
            "written\n"
        )


def test_each_family_has_a_frontier_of_its_own() -> None:
    """c is dominated by b of its own family; of all points, d, b and e are dominated by none."""
    points = [("a", 1.0, 0.9), ("b", 2.0, 0.5), ("c", 3.0, 0.7), ("d", 1.0, 0.8), ("e", 4.0, 0.4)]

    def lengths(families: list[str] | None) -> list[int]:
        figure = render_points("t", points, x_label="x", families=families)
        return [len(of.split()) for of in re.findall(r'class="frontier" points="([^"]*)"', figure)]

    assert lengths(["x", "x", "x", "y", "y"]) == [2, 2]
    assert lengths(None) == [3]
