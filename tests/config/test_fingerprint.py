"""Defaults that depend on the run, and runs that started before these defaults existed."""

from pathlib import Path
from typing import Any

import pytest

from dist_sae.config import dump_run, load_run
from dist_sae.config.fingerprint import as_begun, changes, run_fingerprint
from tests.runs import TINY, write_run


@pytest.mark.parametrize(
    ("rows", "window"),
    [(300_000, 30_000), (99_999_999, 9_999_999), (2_000_000_000, 10_000_000)],
)
def test_the_resolved_run_has_numbers_where_settings_follow_others(
    tmp_path: Path, rows: int, window: int
) -> None:
    path = write_run(tmp_path, TINY)
    run = load_run(path, [f"train.rows={rows}", "sae.dead_after_rows=null"])
    assert run.sae.dead_after_rows == run.dead_after_rows == window
    assert run.train.lr == run.lr > 0
    assert load_run(path, ["sae.dead_after_rows=7"]).dead_after_rows == 7
    open_rows = load_run(path, ["sae.dead_after_rows=7", "train.rows=all"])
    assert open_rows.filled({"train": {"rows": 4096}}).dead_after_rows == 7
    assert "null" not in dump_run(run).split("evaluate:")[0].split("lr:")[1].splitlines()[0]


def test_a_run_that_began_with_the_defaults_of_its_time_is_the_same_run(tmp_path: Path) -> None:
    """The old defaults were 10 million rows for every run, and an unset learning rate."""
    path = write_run(tmp_path, TINY)
    run = load_run(path, ["sae.dead_after_rows=null"])
    stored = run_fingerprint(run)
    assert as_begun(run, stored) == run
    stored["sae"]["dead_after_rows"] = 10_000_000
    stored["train"]["lr"] = None
    assert changes(stored, run) == []
    assert as_begun(run, stored).dead_after_rows == 10_000_000
    other = load_run(path, ["sae.dead_after_rows=5", "train.lr=0.5"])
    assert changes(stored, other) == [
        "sae.dead_after_rows: 10000000 -> 5",
        f"train.lr: {run.lr} -> 0.5",
    ]


@pytest.mark.parametrize(
    "older",
    [
        {"kind": "jumprelu", "sparsity": 6e-4, "initial_threshold": 0.001, "bandwidth": 0.001},
        {"kind": "jumprelu", "sparsity": 1e-3},
        {"kind": "jumprelu", "sparsity": 2e-3},
        {"kind": "jumprelu_tanh", "sparsity": 20.0, "sparsity_warmup_share": 1.0},
        {"kind": "jumprelu_tanh", "sparsity": None},
        {"kind": "relu", "decoder_norm": 0.1},
    ],
)
def test_a_penalised_run_goes_on_with_the_penalty_that_it_began_with(
    tmp_path: Path, older: dict[str, Any]
) -> None:
    """A penalty that the run file omitted keeps its old default.

    A penalty that the file sets now is compared with it.
    """
    kind = {"kind": older["kind"], "n_latents": 64}
    run = load_run(write_run(tmp_path, sae=kind))
    stored = run_fingerprint(run)
    stored["sae"] |= older
    del stored["sae"]["init"]  # the key is newer than the run
    assert changes(stored, run) == []
    assert as_begun(run, stored).sae.model_dump().items() >= older.items()
    other = load_run(write_run(tmp_path, sae={**kind, "sparsity": 0.3}))
    assert changes(stored, other)[0].startswith("sae.sparsity: ")
