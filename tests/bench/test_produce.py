"""`dist-sae bench produce` as a program."""

import json
from pathlib import Path

import pytest

from tests.launch import run
from tests.runs import write_run

pytestmark = pytest.mark.system


def test_bench_produce_measures_beside_the_activation_set(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    run("plan", str(path))
    there = sorted(tmp_path.rglob("*"))
    out = run("bench", "produce", str(path), "--units", "3", "--rounds", "2", "--json")
    result = json.loads(out.splitlines()[-1])
    assert result["units"] == 3
    assert result["rows"] > 3 * 300  # units have about 350 rows
    assert result["ratio_low"] <= result["ratio"] <= result["ratio_high"]
    assert result["rows_per_second"] > 0
    assert 0 <= result["padding"] <= 0.05
    assert result["busy"].keys() == {"tokenize", "forward", "pack", "store"}
    assert sorted(tmp_path.rglob("*")) == there
