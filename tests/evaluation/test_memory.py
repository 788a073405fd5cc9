"""Memory of evaluation and report, which does not grow with the width of the dictionary."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_sae.checkpoint import layout
from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.checkpoint.state import IDLE_ROWS
from dist_sae.config import Run
from dist_sae.config.fingerprint import run_fingerprint
from dist_sae.data.plan import load_plan
from dist_sae.data.work_queue import Worker
from dist_sae.dictionaries import build_sae
from dist_sae.evaluation.evaluate import evaluate
from dist_sae.evaluation.facts import evaluation_key, read_evaluation
from dist_sae.producing.loop import produce
from dist_sae.producing.planner import plan
from dist_sae.report.build import report
from dist_sae.storage import open_store
from dist_sae.telemetry.exporter import Telemetry
from tests.memory import MIB, peak_bytes
from tests.runs import TINY, build_settings
from tests.world import save

D_IN, BUDGET = 64, 100_000_000
SMALL, WIDE = 32_768, 8 * 32_768
"""Widths whose weights take 17 MB, which fit in memory, and 135 MB, which do not."""
KINDS: dict[str, dict[str, Any]] = {
    "topk": {"k": 8, "auxk": 0},
    "jumprelu": {"initial_threshold": 0.1},
}


def write(folder: Path, kind: str, n_latents: int) -> Run:
    """Write a run whose random dictionary fires a little."""
    config = {"kind": kind, "n_latents": n_latents, "dead_after_rows": 100, **KINDS[kind]}
    sections = {"model": {"d_in": D_IN}, "sae": {**config, "init": "random"}}
    settings = build_settings(folder, TINY, sections) | {
        "name": f"{kind}-{n_latents}",
        "evaluate": {"rows": 300, "latents": 2, "memory_bytes": BUDGET},
    }
    run = Run.model_validate(settings).resolved()
    if not (folder / "activations").exists():
        plan(run)
        produce(run, Worker("p"), threading.Event(), Telemetry(run.name, "produce", None))
    sae = build_sae(run.sae, D_IN)
    with torch.no_grad():
        sae.W_dec.normal_()
        sae.constrain()
        sae.W_enc.copy_(sae.W_dec)
        if kind == "jumprelu":
            sae.get_parameter("theta").fill_(0.07)
    tensors = dict(sae.tensors()) | {IDLE_ROWS: torch.zeros(n_latents, dtype=torch.int64)}
    scalars = {
        "scale": 1.0,
        "mean": [0.0] * D_IN,
        "variance": 1.0,
        "rows": 1,
        "plan": load_plan(open_store(run.store.activations), run).hash,
        "run": run_fingerprint(run),
    }
    save(Checkpoints(open_store(run.store.runs), run.name, 1), 1, tensors, scalars)
    return run


@pytest.mark.system
@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_and_report_stay_within_their_budget(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    """Peak memory is the budget, plus one part of a tensor and 80 bytes per latent."""
    if kind == "topk" and not pytestconfig.getoption("--long"):
        pytest.skip("jumprelu, which has one more tensor, is tested by default; topk needs --long")
    monkeypatch.setattr(layout, "PART_BYTES", 4 * MIB)
    tiny, small, wide = (write(tmp_path, kind, n) for n in (1024, SMALL, WIDE))
    for program in (evaluate, report):
        for run in (small, wide):
            peak = peak_bytes(program, (tiny,), (run,))
            assert peak < BUDGET + 4 * MIB + 80 * run.sae.n_latents
    found = read_evaluation(open_store(wide.store.runs), evaluation_key(wide.name))
    assert found is not None
    assert found["l0"] > 1
