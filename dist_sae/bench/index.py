"""`dist-sae bench index`: both stages of a latent index, and reading one latent's page.

Stage 1 reads units, encodes and decodes them, then sorts and stores the codes. The bare encode runs
the same rows, already in memory, through the same dictionary. Both are timed alternately, unit by
unit, and compared by the ratio of each pair. Stage 2 is timed bucket by bucket, each part
separately.
"""

import statistics
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from dist_sae.bench.measuring import compare, medians, peak_memory
from dist_sae.config import Run
from dist_sae.data.activation_set import ActivationSet
from dist_sae.device import own_device
from dist_sae.dictionaries.axis import WHOLE
from dist_sae.distributed.mesh import single_process
from dist_sae.index.cells import load_or_compute_cells
from dist_sae.index.coactive import Sample
from dist_sae.index.context import IndexContext, open_index
from dist_sae.index.encode import ENCODE_ROWS, Encoder, open_encoder
from dist_sae.index.layout import UnitRecord
from dist_sae.index.outputs import open_outputs
from dist_sae.index.query import Index
from dist_sae.index.tables import Origins, build_bucket
from dist_sae.index.units import UnitWriter
from dist_sae.index.weights import open_decoder, weight_columns
from dist_sae.storage.records import seal
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.telemetry.process import resident_bytes

_PAGES = 50
Some = TypeVar("Some")


def bench_index(run: Run, *, units: int) -> dict[str, Any]:
    """Index the first units with a run's newest checkpoint, then delete this temporary index.

    Args:
        units: Number of units. The first one is not timed.

    Returns:
        `rows`; `rows_per_second` of stage 1 and `bare_rows_per_second` of the bare encode, with
        their `ratio` and its quartiles; `entries`; `merged_entries_per_second` of stage 2, without
        its other parts, `weights_seconds` (norms, nearest latents, output tokens) and
        `pairs_seconds`; `postings_bytes_per_entry`; `page_seconds` and `page_seconds_high`, the
        median and the longest time to read a latent's page, including the first read of its
        bucket; `stage_2_peak_bytes`, the peak increase of memory during stage 2.
    """
    device = own_device()
    with _open_context(run, units) as context:
        with open_encoder(context, WHOLE, device, threading.Event()) as encoder:
            records, pairs = _stage_1(context, encoder)
        before = resident_bytes()
        with peak_memory() as peak:
            stage_2 = _stage_2(context, records, device)
        pages = _pages(context)
    rows = sum(record.rows for record in records)
    timed = sum(record.rows for record in records[1:])
    whole, bare = medians(pairs)
    return {
        "units": len(records),
        "rows": rows,
        "rows_per_second": timed / len(pairs) / whole,
        "bare_rows_per_second": timed / len(pairs) / bare,
        **compare([(bare, whole) for whole, bare in pairs]),
        **stage_2,
        "page_seconds": statistics.median(pages),
        "page_seconds_high": max(pages),
        "stage_2_peak_bytes": peak[0] - before,
    }


@contextmanager
def _open_context(run: Run, units: int) -> Iterator[IndexContext]:
    """Open a temporary index of the first units, and delete it on exit."""
    name = f"bench-{uuid.uuid4().hex[:12]}"
    run = run.model_copy(update={"index": run.index.model_copy(update={"name": name})})
    telemetry = Telemetry(run.name, "index", None)
    context = open_index(run, "bench", threading.Event(), telemetry, None)
    chosen = {"units": context.manifest.units[:units]}
    try:
        yield context._replace(manifest=context.manifest.model_copy(update=chosen))
    finally:
        for key in list(context.store.keys(context.folder.prefix)):
            context.store.delete(key)


def _stage_1(
    context: IndexContext, encoder: Encoder
) -> tuple[list[UnitRecord], list[tuple[float, float]]]:
    """Encode and store the units. Returns their records, and (stage 1, bare encode) seconds.

    Like a worker, stores a unit's codes while encoding the next unit. The first unit is not timed.
    """
    store, folder, manifest, *_ = context
    records: list[UnitRecord] = []
    pairs = []
    normalisers = context.normalisers
    activations = ActivationSet(context.activations, context.plan, normalisers.reads)
    following = iter(manifest.units[1:])
    with UnitWriter(store, folder, manifest, single_process(), records.append) as writer:
        for unit in manifest.units:
            acts = torch.cat(list(map(normalisers.inputs, activations.rows([unit], 2**62))))
            bare, _ = _timed(partial(_encode, encoder, acts))
            since = time.perf_counter()
            encoded = encoder.encode(unit, claim_next=partial(next, following, None))
            writer.put(encoded, encoder.sae)
            pairs.append((time.perf_counter() - since, bare))
        writer.finish()
    return records, pairs[1:]


def _encode(encoder: Encoder, acts: Tensor) -> None:
    for rows in torch.split(acts, ENCODE_ROWS):
        encoder.sae.encode(rows.to(encoder.sae.b_dec.device))
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _stage_2(
    context: IndexContext, records: list[UnitRecord], device: torch.device
) -> dict[str, float]:
    store, folder, manifest, _, checkpoint, *_ = context
    origins = Origins(store, records)
    pairs_seconds, sample = _timed(partial(Sample, store, manifest, records))
    place = (store, folder.prefix, checkpoint, device)
    cells = load_or_compute_cells(*place) if context.neighbours else None
    decoder = open_decoder(context)
    outputs = open_outputs(context.model, manifest, context.normalisers)
    entries = posted = 0
    merge_seconds = weights_seconds = 0.0
    for bucket in range(manifest.n_buckets):
        latents = manifest.bucket(bucket)
        of_weights = partial(weight_columns, context, latents, decoder, cells, outputs, device)
        seconds, weights = _timed(of_weights)
        weights_seconds += seconds
        seconds, record = _timed(
            partial(build_bucket, store, folder, manifest, records, bucket, weights, origins, None)
        )
        merge_seconds += seconds
        seconds, _ = _timed(partial(sample.pairs, latents))
        pairs_seconds += seconds
        store.put(folder.buckets.key(bucket), seal(record))
        entries += record.entries
        posted += sum(piece.stored.bytes for piece in record.postings)
    return {
        "entries": entries,
        "merged_entries_per_second": entries / merge_seconds,
        "weights_seconds": weights_seconds,
        "pairs_seconds": pairs_seconds,
        "postings_bytes_per_entry": posted / max(1, entries),
    }


def _pages(context: IndexContext) -> list[float]:
    """Return the seconds to read each of `_PAGES` pages, of evenly spaced latents."""
    index = Index(context.store, context.run.name, context.manifest.name)
    latents = torch.linspace(0, index.n_latents - 1, _PAGES).long().tolist()
    return [_timed(partial(index.latent, latent))[0] for latent in latents]


def _timed(call: Callable[[], Some]) -> tuple[float, Some]:
    since = time.perf_counter()
    result = call()
    return time.perf_counter() - since, result
