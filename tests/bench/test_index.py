"""`dist-sae bench index` as a program."""

import json
from pathlib import Path

import pytest

from tests.index.indexed import add_checkpoint, make_index, produced
from tests.launch import run

pytestmark = pytest.mark.system


def test_bench_index_measures_what_an_index_takes_and_leaves_nothing(tmp_path: Path) -> None:
    of = produced(tmp_path, index={"pairs": 10**6})
    add_checkpoint(of)
    made = make_index(of)
    there = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    folder = f"{of.store.runs}/{of.name}"
    out = run("bench", "index", folder, "--set", "index.pairs=1000000", "--json")
    result = json.loads(out.splitlines()[-1])
    assert (result["units"], result["rows"]) == (made["units"], made["rows"])
    assert result["entries"] == made["entries"]
    posted = made["bytes"]["postings"] / made["entries"]
    assert result["postings_bytes_per_entry"] == pytest.approx(posted)
    assert result["ratio_low"] <= result["ratio"] <= result["ratio_high"]
    assert 0 < result["page_seconds"] <= result["page_seconds_high"]
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == there
