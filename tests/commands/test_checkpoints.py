"""`dist-sae checkpoints` as a user calls it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dist_sae import logs
from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.commands import cli
from dist_sae.config import load_run
from dist_sae.config.fingerprint import run_fingerprint
from dist_sae.storage import open_store
from tests.runs import write_run
from tests.world import save

TENSORS = {
    "W_enc": torch.randn(64, 16, generator=torch.Generator().manual_seed(0)),
    "exp_avg.W_enc": torch.ones(64, 16),
    "b_dec": torch.arange(16.0),
}


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """Return stdout, or stderr if a failure is expected."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "configure", lambda **_: None)
        assert cli.main(["checkpoints", *arguments]) == code
    said = capsys.readouterr()
    return said.err if code else said.out


def scalars(path: Path) -> dict[str, Any]:
    return {"scale": 0.5, "run": run_fingerprint(load_run(path))}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A run with two checkpoints."""
    path = write_run(tmp_path)
    checkpoints = Checkpoints(open_store(str(tmp_path / "runs")), "world", 2)
    for step in (10, 20):
        save(checkpoints, step, {n: t + step for n, t in TENSORS.items()}, scalars(path))
    return path


def part(path: Path, step: int, name: str) -> Path:
    return load_run_folder(path) / f"step-{step:08d}" / name


def load_run_folder(path: Path) -> Path:
    return Path(load_run(path).store.runs) / "world" / "checkpoints"


def test_ls_says_what_is_there(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "ls", str(path), "--json"))
    assert [c["step"] for c in found["checkpoints"]] == [10, 20]
    assert found["checkpoints"][0] | {"bytes": 0} == {
        "step": 10,
        "rows": 1600,
        "n_latents": 64,
        "parts": 3,
        "bytes": 0,
    }
    folder = load_run_folder(path) / "step-00000010"
    sizes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert found["checkpoints"][0]["bytes"] == sizes
    manifest = part(path, 20, "manifest.json")
    manifest.write_bytes(manifest.read_bytes()[:-3])
    said = run(capsys, "ls", str(path))
    assert "step 10 " in said
    assert "step 20         damaged" in said


def test_verify_reads_every_part(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "verify", str(path), "--json"))
    assert (found["checkpoints"], found["parts"], found["bad"]) == (2, 6, 0)
    damaged = part(path, 10, "W_enc-000000000.safetensors")
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    part(path, 20, "b_dec-000000000.safetensors").unlink()
    error = run(capsys, "verify", str(path), code=2)
    assert "step-00000010/W_enc-000000000.safetensors: does not match its checksum" in error
    assert "step-00000020/b_dec-000000000.safetensors" in error


def test_verify_finds_rows_that_nobody_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path)
    checkpoints = Checkpoints(open_store(str(tmp_path / "runs")), "world", 2)
    save(checkpoints, 10, TENSORS, {})
    manifest = checkpoints.open(10).manifest
    W_enc = manifest.tensors["W_enc"].model_copy(update={"shape": (65, 16)})
    checkpoints.commit(10, [{**manifest.tensors, "W_enc": W_enc}], {})
    assert "W_enc is missing rows from 64 on" in run(capsys, "verify", str(path), code=2)


def test_convert_writes_whole_tensors(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "whole.safetensors"
    run(capsys, "convert", str(path), "--output", str(output))
    assert load_file(output).keys() == {"W_enc", "b_dec"}
    assert torch.equal(load_file(output)["W_enc"], TENSORS["W_enc"] + 20)
    with safe_open(output, "pt") as file:
        assert file.metadata()["step"] == "20"
        assert json.loads(file.metadata()["scalars"]) == json.loads(json.dumps(scalars(path)))
    older = ["--step", "10", "--moments", "--output", str(output)]
    run(capsys, "convert", str(path), *older)
    assert torch.equal(load_file(output)["exp_avg.W_enc"], TENSORS["exp_avg.W_enc"] + 10)
    error = run(capsys, "convert", str(path), "--step", "15", "--output", "x", code=2)
    assert "--step" in error
    assert "available steps: 10, 20" in error


def test_convert_takes_one_target(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for targets in ((), ("--output", "x", "--to-run", "y")):
        with pytest.raises(SystemExit):
            run(capsys, "convert", str(path), *targets)
    assert "--to-run" in capsys.readouterr().err


def test_convert_has_another_run_begin_with_a_checkpoint(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(open_store(str(tmp_path / "runs")), "world", 3)
    save(checkpoints, 30, TENSORS, scalars(path))
    other = write_run(tmp_path / "other", name="wider", sae={"n_latents": 96})
    result = json.loads(run(capsys, "convert", str(path), "--to-run", str(other), "--json"))
    assert {**result, "bytes": 0} == {
        "step": 30,
        "known_latents": 64,
        "new_latents": 32,
        "bytes": 0,
        "run": "wider",
    }
    left = Checkpoints(open_store(str(tmp_path / "other/runs")), "wider", 1, folder="warm-start")
    assert torch.equal(left.open(30).read("W_enc"), TENSORS["W_enc"])
