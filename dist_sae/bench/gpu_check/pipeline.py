"""Stage `pipeline`: plan, produce and train with a small random Llama, then stop and resume."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from dist_sae.bench.gpu_check.stage import (
    Record,
    StageContext,
    comparison,
    measurement,
    relative_error,
)
from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.config import Run, load_run
from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.plan import load_plan
from dist_sae.data.work_queue import Worker
from dist_sae.distributed.mesh import single_process
from dist_sae.errors import EXIT_RESUMABLE
from dist_sae.evaluation.evaluate import evaluate
from dist_sae.logs import SUPERVISED
from dist_sae.producing.loop import produce
from dist_sae.producing.planner import plan
from dist_sae.storage import open_store
from dist_sae.telemetry.exporter import Telemetry

_SITE = "resid_post.1"
_WORDS = 500
_ROWS_BOUND = 1e-4
"""Largest relative difference of fp32 activations."""
_LIMIT_SECONDS = 600.0  # a fallback: the stage has its own limit


def pipeline(context: StageContext) -> Iterator[Record]:
    """Run programs as processes where the check needs a new process, else call their functions."""
    path = _make(context)
    run = load_run(path)
    plan(run)
    with Telemetry(run.name, "produce", None) as telemetry:
        produced = produce(run, Worker("check"), threading.Event(), telemetry)
    yield measurement("produced", **produced)
    on_cpu = [f"store.activations={context.folder / 'on_cpu'}", "processes.device=cpu"]
    plan(load_run(path, on_cpu))
    processes = [
        _start("produce", path, *on_cpu),
        _start("train", path, "name=straight"),
        _start("train", path, "name=stopped"),
    ]
    try:
        stopped_at = _stop(processes[2])
        ends = [process.wait(_LIMIT_SECONDS) for process in processes]
        yield comparison(
            "run stopped by SIGTERM", int(ends[2] != EXIT_RESUMABLE), 0, step=stopped_at
        )
        yield _same_rows(run, load_run(path, on_cpu))
        processes.append(_start("train", path, "name=stopped"))
        ends += [processes[3].wait(_LIMIT_SECONDS)]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    yield comparison(
        "other programs exit with 0", sum(code != 0 for code in (*ends[:2], ends[3])), 0
    )
    yield _same_weights(run)
    found = evaluate(load_run(path, ["name=straight"]), mesh=single_process())
    kept = ("fvu", "pca_fvu", "l0", "ce_clean", "ce_spliced", "evaluate_seconds")
    yield measurement("evaluated", **{name: found[name] for name in kept if name in found})


def _make(context: StageContext) -> Path:
    """Write the model, its tokenizer, a text and the run file. Returns the run file's path."""
    import transformers  # slow to import
    from tokenizers import Tokenizer, models, pre_tokenizers

    d_in, layers, documents, batch = (16, 2, 60, 64) if context.is_dry else (256, 4, 4000, 2048)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=_WORDS,
        hidden_size=d_in,
        intermediate_size=2 * d_in,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    folder = context.folder / "model"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words = {"<s>": 0, "</s>": 1, "?": 2} | {f"w{i}": i for i in range(3, _WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast: Any = transformers.PreTrainedTokenizerFast  # not typed
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    fast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    chosen = random.Random(0)
    texts = (
        " ".join(f"w{chosen.randrange(3, _WORDS)}" for _ in range(120)) for _ in range(documents)
    )
    text = context.folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    rows = 40 * batch if context.is_dry else 150 * batch
    settings: dict[str, Any] = {
        "name": "check",
        "store": {
            "activations": str(context.folder / "acts"),
            "runs": str(context.folder / "runs"),
        },
        "model": {"kind": "huggingface", "path": str(folder), "dtype": "fp32"},
        "corpus": {"kind": "files", "files": [str(text)]},
        "activations": {"sites": [_SITE], "context_tokens": 64, "streams": 4, "dtype": "fp32"},
        "sae": {"kind": "topk", "n_latents": 8 * d_in, "k": 4, "auxk": 16},
        "train": {
            "rows": rows,
            "batch_rows": batch,
            "log_every_steps": 1,
            "save_every_steps": 10,
            "heldout_rows": batch // 4,
        },
        "evaluate": {"rows": 4 * batch, "contexts": 16},
        "index": {"workers": 0},
    }
    path = context.folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def _start(program: str, path: Path, *overrides: str) -> "subprocess.Popen[str]":
    """Start a program that logs its steps as JSON lines."""
    options = [word for override in overrides for word in ("--set", override)]
    command = [sys.executable, "-m", "dist_sae", program, str(path), *options]
    environment = os.environ | {SUPERVISED: "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def _stop(process: "subprocess.Popen[str]") -> int:
    """Send SIGTERM to a training run after five steps or more. Returns the number of steps."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{") and (done := json.loads(line).get("done", 0)) >= 5:
            process.send_signal(signal.SIGTERM)
            return int(done)
    return 0


def _same_rows(run: Run, on_cpu: Run) -> Record:
    """Compare all rows produced on the device with the rows produced on the CPU."""
    error, n_rows = 0.0, 0
    for one, other in itertools.zip_longest(*map(_rows, (run, on_cpu))):
        if one is None or other is None or one.shape != other.shape:
            return comparison("rows compared with the CPU", float("nan"), _ROWS_BOUND)
        error, n_rows = max(error, relative_error(one, other)), n_rows + len(one)
    return comparison("rows compared with the CPU", error, _ROWS_BOUND, rows=n_rows)


def _rows(run: Run) -> Iterator[torch.Tensor]:
    store = open_store(run.store.activations)
    loaded_plan = load_plan(store, run)
    activations = ActivationSet(store, loaded_plan, (_SITE,), wait=False)
    for block in activations.rows(range(len(loaded_plan.units)), 2**62):
        yield block[_SITE]


def _same_weights(run: Run) -> Record:
    """Compare the last checkpoints of the stopped and the uninterrupted run, tensor by tensor."""
    runs = open_store(run.store.runs)
    one, other = (Checkpoints(runs, name, 1).latest() for name in ("straight", "stopped"))
    assert one is not None
    assert other is not None
    names = one.manifest.tensors.keys() | other.manifest.tensors.keys()
    unlike = sum(not torch.equal(one.read(name), other.read(name)) for name in names)
    unlike += one.step != other.step
    return comparison("resumed in a new process, bitwise", unlike, 0, step=other.step)
