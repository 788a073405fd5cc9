"""The trainer warns about a useless dictionary, once enough steps are done to know it."""

import re
from pathlib import Path
from typing import Any

import pytest

from dist_sae.config import load_run
from dist_sae.training.health import training_warning
from tests.runs import write_run

PENALISED: dict[str, Any] = {"kind": "jumprelu", "n_latents": 64}
TARGETED: dict[str, Any] = {"kind": "jumprelu", "n_latents": 64, "target_l0": 4}
COUNTING: dict[str, Any] = {"kind": "topk", "n_latents": 64, "k": 3, "auxk": 16}


@pytest.mark.parametrize(
    ("sae", "l0", "dead", "expected"),
    [
        (
            PENALISED,
            9.0,
            0.0,
            "9 latents are active per row of 16 numbers, .*; raise sae.sparsity",
        ),
        (COUNTING, 9.0, 0.0, "9 latents are active per row of 16 numbers, .*; lower sae.k"),
        (
            TARGETED,
            9.0,
            0.0,
            "9 latents are active per row of 16 numbers, .*; lower sae.target_l0",
        ),
        (PENALISED, 0.25, 0.9, "0.25 latents are active per row, .*; lower sae.sparsity"),
        (PENALISED, 2.0, 0.83, "83% of the latents are dead .*; lower sae.sparsity, or .*"),
        (COUNTING, 2.0, 0.31, "31% of the latents are dead .*; raise sae.k, or .*"),
    ],
)
def test_what_is_out_of_range_is_said_with_what_helps(
    tmp_path: Path, sae: dict[str, Any], l0: float, dead: float, expected: str
) -> None:
    run = load_run(write_run(tmp_path, sae=sae))
    numbers = {"l0_latents": l0, "dead_share": dead}
    late = -(-run.steps // 4)
    found = training_warning(run, 16, late, numbers)
    assert found is not None
    assert re.fullmatch(expected, found)
    assert training_warning(run, 16, late - 1, numbers) is None


@pytest.mark.parametrize("sae", [PENALISED, COUNTING])
def test_an_ordinary_dictionary_is_not_doubted(tmp_path: Path, sae: dict[str, Any]) -> None:
    run = load_run(write_run(tmp_path, sae=sae))
    assert training_warning(run, 16, run.steps, {"l0_latents": 8.0, "dead_share": 0.3}) is None
    assert (
        training_warning(run, 16, run.steps, {"l0_latents": 1.0}) is None
    )  # the dead latents are not known yet
