"""`dist-sae bench produce`: a producer against the bare forward pass to the same layer.

The real producer reads and tokenizes text, runs the model, then packs, checks and stores the
activations. The bare pass runs the same batches, already tokenized, through the same model and
drops the result. Both are timed alternately and compared by the ratio of each pair. The producer's
time starts when it is about to load the model, because earlier work happens once per run, and ends
with its last unit.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch

from dist_sae.bench.measuring import compare, medians, peak_memory, scratch
from dist_sae.config import Run
from dist_sae.data.plan import publish_plan
from dist_sae.data.planned_text import PlannedText
from dist_sae.data.shard import read_manifest
from dist_sae.data.tokens import TokenBatch
from dist_sae.data.work_queue import Worker
from dist_sae.models import ActivationSource, build_source, build_tokenizer
from dist_sae.producing.loop import produce
from dist_sae.producing.planner import plan
from dist_sae.producing.stages import tokenize
from dist_sae.storage import open_store
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.telemetry.process import resident_bytes


def bench_produce(run: Run, *, units: int, rounds: int) -> dict[str, Any]:
    """Produce the first units of a run's plan at a temporary location, then delete them.

    Args:
        units: Number of units, limited to the plan's training units.
        rounds: Number of timed pairs.

    Returns:
        Medians over `rounds`: `rows_per_second` of the producer and `bare_rows_per_second`;
        `ratio` with `ratio_low` and `ratio_high` (quartiles of the pairs). `padding` is a share of
        the model's tokens; `model_bytes` is the resident memory after a bare pass, and
        `beyond_model_bytes` the peak increase above it; `busy` is the share of the last round in
        which each stage was working.
    """
    source = build_source(run.model, run.activations.sites)
    begun, pairs = [0.0], []

    def open_source() -> ActivationSource:
        begun[0] = time.perf_counter()
        return source

    with scratch(run.store.activations, run.store.s3) as store, peak_memory() as peak:
        whole = plan(_with_activations_at(run, f"{store.url}/plan"))
        units = min(units, whole.n_train_units)
        less = {"units": whole.units[:units], "n_train_units": units, "texts_stored": False}
        part = whole.model_copy(update=less)
        text = PlannedText(run, part, store)
        tokenizer = build_tokenizer(run)
        batches = [
            batch for unit in range(units) for batch in tokenize(run, text, tokenizer, unit).batches
        ]
        _run(source, batches)
        before = peak[0] = resident_bytes()
        for number in range(rounds):
            here = _with_activations_at(run, f"{store.url}/{number}")
            place = open_store(here.store.activations, here.store.s3)
            publish_plan(place, part)
            bare = _run(source, batches)
            with Telemetry("bench", "produce", None) as telemetry:
                produced = produce(here, Worker("bench"), threading.Event(), telemetry, open_source)
            pairs.append((bare, time.perf_counter() - begun[0]))
        busy = Counter[str]()
        for unit in range(units):
            busy.update(read_manifest(place, unit).seconds)
    rows, (bare, whole_seconds) = produced["rows"], medians(pairs)
    tokens = sum(batch.tokens.numel() for batch in batches)
    return {
        "units": units,
        "rows": rows,
        "rounds": rounds,
        "rows_per_second": rows / whole_seconds,
        "bare_rows_per_second": rows / bare,
        **compare(pairs),
        "padding": 1 - sum(int(batch.mask.sum()) for batch in batches) / tokens,
        "model_bytes": before,
        "beyond_model_bytes": peak[0] - before,
        "busy": {stage: seconds / pairs[-1][1] for stage, seconds in sorted(busy.items())},
    }


def _run(source: ActivationSource, batches: Iterable[TokenBatch]) -> float:
    """Run the bare forward pass. Returns its seconds."""
    since = time.perf_counter()
    for batch in batches:
        source.run(batch.tokens, batch.mask)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - since


def _with_activations_at(run: Run, url: str) -> Run:
    return run.model_copy(
        update={"store": run.store.model_copy(update={"activations": url, "max_ahead_units": None})}
    )
