"""Programs that read a run use the settings it was trained with, or refuse to read it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_sae.commands.cli import main
from dist_sae.config import load_run
from dist_sae.config.fingerprint import check_same_run, run_fingerprint
from dist_sae.errors import PlanMismatchError
from tests.conftest import Bucket
from tests.training.trained import final, run_file

READERS = (
    ("evaluate",),
    ("export",),
    ("report",),
    ("checkpoints", "ls"),
    ("checkpoints", "convert", "--output", "/dev/null"),
)


def written(folder: Path) -> dict[str, bytes]:
    """Return the content of every file of the run, by name."""
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def call(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """Return the last line of stdout, or the one error line if a failure is expected."""
    assert main(arguments) == code
    said = capsys.readouterr()
    if not code:
        return said.out.splitlines()[-1]
    (line,) = (line for line in said.err.splitlines() if line.startswith("error: "))
    return line


@pytest.mark.parametrize("reader", READERS, ids=" ".join)
def test_a_run_file_of_other_settings_is_refused(
    calm: Path, activations: str, capsys: pytest.CaptureFixture[str], reader: tuple[str, ...]
) -> None:
    """The error names each setting that differs, and no file is changed."""
    path, before = str(run_file(calm, activations)), written(calm / "runs")
    for override, said in (
        ("sae.k=2", "sae.k: 3 -> 2"),
        ("sae.n_latents=32", "sae.n_latents: 64 -> 32"),
        ("sae={kind: relu, n_latents: 64}", "sae.kind: topk -> relu"),
        ("train.seed=1", "train.seed: 0 -> 1"),
    ):
        line = call(capsys, *reader, path, "--set", override, code=2)
        assert said in line
        assert f"or pass its folder, {calm / 'runs/world'}, as the run file" in line
    assert written(calm / "runs") == before


def test_the_folder_of_a_run_is_its_run_file(
    calm: Path, activations: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that was moved works too: it stores where its activation set is, and gets the
    results itself.
    """
    folder = shutil.copytree(calm / "runs" / "world", tmp_path / "elsewhere" / "world")
    path = str(run_file(calm, activations))
    typed = json.loads(call(capsys, "evaluate", path, "--json"))
    for argument in (str(folder), folder.as_uri(), f"{folder.as_uri()}/run.yaml"):
        found = json.loads(call(capsys, "evaluate", argument, "--json"))
        assert found["fvu"] == typed["fvu"]
    assert (folder / "evaluation.json").exists()
    exported = json.loads(call(capsys, "export", str(folder), "--json"))["export"]
    assert exported == str(folder / "export")
    assert json.loads(call(capsys, "store", "ls", str(folder), "--json"))["retired_units"] == 0
    assert call(capsys, "config", "show", str(folder), "--set", "evaluate.rows=7", "--json")
    renamed = folder.rename(folder.with_name("other"))
    assert "belongs to run world" in call(capsys, "evaluate", str(renamed), code=2)
    (renamed / "run.yaml").unlink()
    assert "has no run.yaml" in call(capsys, "evaluate", str(renamed), code=2)


def test_a_folder_may_be_in_a_bucket(
    calm: Path, bucket: Bucket, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (calm / "runs").rglob("*"):
        if path.is_file():
            key = f"some/runs/{path.relative_to(calm / 'runs')}"
            bucket.client.put_object(Bucket=bucket.name, Key=key, Body=path.read_bytes())
    url = f"s3://{bucket.name}/some/runs"
    there = ("--set", f"store.s3.endpoint_url={bucket.endpoint_url}")
    listed = json.loads(call(capsys, "checkpoints", "ls", f"{url}/world", *there, "--json"))
    assert [c["rows"] for c in listed["checkpoints"]] == [9600]
    assert "has no run.yaml" in call(capsys, "export", f"{url}/none", *there, code=2)


def test_older_settings_mean_what_they_meant(calm: Path, activations: str) -> None:
    """A key that did not exist yet has its default, and a value that is derived from others is
    equal.
    """
    run = load_run(run_file(calm, activations))
    settings: dict[str, Any] = json.loads(json.dumps(final(calm).scalars["run"]))
    assert check_same_run(settings, run, "here").sae == run.sae
    del settings["sae"]["k_anneal_share"], settings["train"]["seed"], settings["train"]["kernels"]
    assert check_same_run(settings, run, "here").train.kernels == "auto"
    # this key is free to change
    seldom = load_run(run_file(calm, activations), ["train.save_every_steps=7"])
    assert check_same_run(settings, seldom, "here").train.save_every_steps == 7
    settings["train"]["site"] = "synthetic"  # the only site
    check_same_run(settings, run, "here")
    settings["train"]["lr"] = None  # the default rate, which is not 3e-3
    with pytest.raises(PlanMismatchError, match=r"train\.lr: .* -> 0\.003\); restore them"):
        check_same_run(settings, run, "here")
    free = load_run(run_file(calm, activations), ["train.lr=null"])
    check_same_run(run_fingerprint(free), free, "here")
    check_same_run(
        run_fingerprint(free),
        load_run(run_file(calm, activations), [f"train.lr={free.lr}"]),
        "here",
    )


def test_another_activation_set_is_refused(
    calm: Path, activations: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run file describes this set correctly, but the run was not trained on it."""
    path = run_file(calm, activations)
    data = yaml.safe_load(path.read_text())
    data["activations"]["seed"] = 1
    data["store"]["activations"] = str(tmp_path / "other")
    other = tmp_path / "run.yaml"
    other.write_text(yaml.safe_dump(data))
    call(capsys, "plan", str(other))
    for program in ("evaluate", "report"):
        line = call(capsys, program, str(other), code=2)
        assert "was trained on a different activation set" in line
