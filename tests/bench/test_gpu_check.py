"""`launch/gpu_check.sh`: its dry run on the CPU, and how failed stages are reported."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_sae.bench.gpu_check import __main__ as driver

ROOT = Path(__file__).parents[2]
NOT_NEEDED = ("boto3", "botocore", "datasets", "kubernetes", "tensorboard", "wandb")
"""Packages that a machine with a GPU may lack."""
LACKING = f"""
import sys
from importlib.machinery import PathFinder

class Lacking(PathFinder):
    @classmethod
    def find_spec(cls, name, *place):
        lacks = name.partition(".")[0] in {NOT_NEEDED}
        return None if lacks else PathFinder.find_spec(name, *place)

sys.meta_path[sys.meta_path.index(PathFinder)] = Lacking
"""
"""A `sitecustomize` that makes these packages unavailable."""


@pytest.mark.system
def test_the_dry_run_passes_every_stage_without_clients_of_clusters_and_stores(
    tmp_path: Path,
) -> None:
    (tmp_path / "sitecustomize.py").write_text(LACKING)
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(
        [ROOT / "launch/gpu_check.sh", "--device", "cpu"],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    lines = ended.stdout.splitlines()
    records = [json.loads(line) for line in lines if line.startswith("{")]
    assert list(dict.fromkeys(record["stage"] for record in records)) == list(driver.LIMITS_SECONDS)
    names = {record["check"] for record in records}
    assert {
        "versions",
        "gated: the same steps twice, bitwise",
        "rows compared with the CPU",
        "resumed in a new process, bitwise",
        "2 x 1, topk: compared with one rank",
        "routed, 256 latents",
    } <= names
    assert lines[-1] == f"{len(records)} checks, 0 failed"


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[int, list[str]]]:
    """Run two stages as shell commands; return the exit code and the printed lines."""

    def run(line: str) -> tuple[int, list[str]]:
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{line}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        monkeypatch.setitem(driver.LIMITS_SECONDS, "speed", 0.5)
        code = driver.main(["--only", "speed,ranks"])
        return code, capsys.readouterr().out.splitlines()

    return run


def test_all_is_well_if_every_check_held(run: Callable[[str], tuple[int, list[str]]]) -> None:
    code, lines = run("""echo words; echo '{"check": "a", "ok": true, "error": 0.25}'""")
    assert code == 0
    assert [json.loads(line)["stage"] for line in lines[:2]] == ["speed", "ranks"]
    assert lines[2].split() == ["ok", "speed", "a", "error", "0.25"]
    assert lines[-1] == "2 checks, 0 failed"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("""echo '{"check": "a", "ok": true}'; echo boom >&2; exit 3""", "boom"),
        ("exit 3", "exit code 3"),
        ("[ $6 = ranks ] || exec sleep 60", "took more than 0.5 s"),
    ],
)
def test_a_stage_that_breaks_off_or_hangs_fails_with_the_reason(
    run: Callable[[str], tuple[int, list[str]]], line: str, reason: str
) -> None:
    code, lines = run(line)
    assert code == 1
    failed = [json.loads(line) for line in lines if '"reason"' in line]
    assert failed[0]["reason"] == reason
    assert failed[0]["ok"] is False
    assert any(line.startswith("FAILED  speed") and line.endswith(reason) for line in lines)


def test_a_check_that_did_not_hold_fails_alone(run: Callable[[str], tuple[int, list[str]]]) -> None:
    code, lines = run(
        """echo '{"check": "a", "ok": '$([ $6 = ranks ] && echo true || echo false)}"""
    )
    assert code == 1
    assert [line.split()[:2] for line in lines[-3:-1]] == [["FAILED", "speed"], ["ok", "ranks"]]
    assert lines[-1] == "2 checks, 1 failed"
