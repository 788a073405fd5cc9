"""Evaluation by two rank processes that share the dictionary and the language model."""

import json
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.checkpoint.state import IDLE_ROWS
from dist_sae.config import load_run
from dist_sae.config.fingerprint import run_fingerprint
from dist_sae.data.plan import load_plan
from dist_sae.data.work_queue import Worker
from dist_sae.dictionaries import build_sae
from dist_sae.distributed.local_ranks import rank_environments
from dist_sae.producing.loop import produce
from dist_sae.producing.planner import plan
from dist_sae.storage import open_store
from dist_sae.telemetry.exporter import Telemetry
from tests.dictionaries.recipes import sae_rows
from tests.forks import HANG_SECONDS
from tests.launch import run as run_program
from tests.launch import start
from tests.models.test_huggingface import D, save_model
from tests.models.test_sharded import UNEVEN
from tests.producing.test_produce_together import run_file
from tests.runs import write_run
from tests.world import save

pytestmark = pytest.mark.system

N_LATENTS = 48
CASES: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "whole models": ("even", "resid_post.1", {"kind": "batchtopk", "k": 5}, 1),
    "even": ("even", "resid_post.1", {"kind": "topk", "k": 5, "auxk": 0}, 2),
    "uneven": ("uneven", "attn_z.0", {"kind": "routed", "k": 4, "experts": 4}, 2),
}
"""Model, site, recipe, and number of ranks that share the model."""


def evaluate_on_two(path: Path, *options: str) -> list[tuple[int, str, str]]:
    """Evaluate on two ranks; return each rank's exit code, stdout and stderr."""
    ranks = [
        start("evaluate", str(path), "--json", *options, env=env) for env in rank_environments(2, 2)
    ]
    said = [rank.communicate(timeout=HANG_SECONDS) for rank in ranks]
    return [(rank.returncode, *words) for rank, words in zip(ranks, said, strict=True)]  # type: ignore[misc]


def prepare(folder: Path, case: str) -> Path:
    """Produce activations and save a new dictionary; return the run file's path."""
    name, site, recipe, _ = CASES[case]
    config = UNEVEN["llama"]() if name == "uneven" else None
    path = run_file(folder, save_model(folder / "model", "llama", config))
    given = load_run(path).model_dump(mode="json", exclude_unset=True)
    sections = {key: given[key] for key in ("model", "corpus", "activations")}
    sections["activations"]["heldout_share"] = 0.1
    sae = {"n_latents": N_LATENTS, **recipe}
    evaluate = {"contexts": 12, "rows": 150}
    write_run(folder, sae=sae, train={"site": site}, evaluate=evaluate, **sections)
    run = load_run(path)
    plan(run)
    produce(run, Worker("p"), threading.Event(), Telemetry(run.name, "produce", None))
    d_in = D if config is None else config.hidden_size
    dictionary = build_sae(run.sae, d_in)
    x = torch.randn(256, d_in, generator=torch.Generator().manual_seed(0))
    dictionary.initialise(sae_rows(x), 0)
    tensors = dict(dictionary.tensors())
    if "threshold" in tensors:
        tensors["threshold"] = torch.tensor([0.5, 1.0], dtype=torch.float64)
    tensors[IDLE_ROWS] = torch.zeros(N_LATENTS, dtype=torch.int64)
    scalars = {
        "scale": 0.5,
        "mean": [0.125] * d_in,
        "variance": 1.0,
        "rows": 1,
        "plan": load_plan(open_store(run.store.activations), run).hash,
        "run": run_fingerprint(run),
    }
    save(Checkpoints(open_store(run.store.runs), run.name, 2), 4, tensors, scalars)
    return path


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_measure_what_one_does(tmp_path: Path, case: str) -> None:
    """Two ranks give one process's results, whether or not they share the language model.

    Each rank runs the whole model in transformers, or both share it in DeepSpeed. In DeepSpeed each
    rank may have only some of the site's columns.
    """
    path = prepare(tmp_path, case)
    expected = json.loads(run_program("evaluate", str(path), "--json").splitlines()[-1])
    run = load_run(path)
    kept = Path(run.store.runs) / run.name / "evaluation.json"
    kept.unlink()
    shutil.rmtree(Path(run.store.activations) / "evaluation")
    (code, out, err), (other_code, nothing, other_err) = evaluate_on_two(
        path, "--set", f"model.tensor_parallel={CASES[case][3]}"
    )
    assert (code, other_code) == (0, 0), err[-2000:] + other_err[-2000:]
    assert nothing == ""
    assert ("divided over 2 ranks" in err) == (CASES[case][3] == 2)
    found = json.loads(out.splitlines()[-1])
    assert found == json.loads(kept.read_text())
    assert found.keys() == expected.keys()
    assert found["l0"] > 1
    assert "ce_spliced" in found
    for name in found.keys() - {"evaluate_seconds", "intervals", "made_from"}:
        wanted = expected[name]
        if isinstance(wanted, float):
            wanted = pytest.approx(wanted, rel=1e-4)
        assert found[name] == wanted, name


def test_one_command_starts_all_ranks_of_a_pod(tmp_path: Path, preloaded: dict[str, Path]) -> None:
    path = prepare(tmp_path, "whole models")
    command = [str(preloaded["dist-sae"]), "evaluate", str(path), "--json", "--local-ranks", "2"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = json.loads(out.splitlines()[-1])
    run = load_run(path)
    assert found == json.loads((Path(run.store.runs) / run.name / "evaluation.json").read_text())
    assert found["rows"] > 0


def test_ranks_that_cannot_share_the_latents_are_an_error(tmp_path: Path) -> None:
    path = write_run(tmp_path, sae={"n_latents": 63})
    assert [code for code, _, _ in evaluate_on_two(path)] == [2, 2]
    _, _, err = evaluate_on_two(path)[0]
    assert "WORLD_SIZE is 2, which does not divide the 63 latents; start a number of ranks" in err
