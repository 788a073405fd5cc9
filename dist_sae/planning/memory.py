"""Peak memory of each process, by part. Parts that never coexist are not added up."""

from collections import Counter
from collections.abc import Sequence

import torch

from dist_sae.checkpoint.layout import PART_BYTES
from dist_sae.config.dictionary import KSelectionConfig
from dist_sae.data.shard import DTYPES, ORIGIN_BYTES, rows_of_block
from dist_sae.dictionaries import PRODUCT_DTYPES
from dist_sae.dictionaries.axis import WHOLE, LatentAxis
from dist_sae.dictionaries.penalised import CHUNK_BYTES as DENSE_BYTES
from dist_sae.index.encode import ENCODE_ROWS
from dist_sae.kernels.select import CHUNK_BYTES, CHUNK_LATENTS, block_size
from dist_sae.planning.sizes import RunSizes, sites_of
from dist_sae.training.memory import state_bytes

CUDA_BYTES = 700 * 10**6
"""GPU memory of a CUDA context and its libraries; an assumption."""
_FP32 = 4
_ENTRY_BYTES = 80  # per entry of a code: value, row, latent, their sorts, gradients
_DENSE_CHUNKS = 8  # chunks that a dense penalised step has at once (`dictionaries.penalised`)
_BATCHES = 4  # `config.run.rows_ahead`: two wait, one is assembled, one is trained on
_COPIES = 2  # checkpoint copies in a sweep: one is stored while the next job's is made
_ENCODED = 2  # copies of a part of a tensor while it is written to a file
_HEAP_BYTES = 64 * 2**20  # free memory that malloc keeps before it returns any
_BLOCKS = 3  # per unit: one in use, one being fetched, one of the next window
_UNITS = 6  # in a producer, with copies: two being computed, one being stored

Parts = dict[str, int]
"""Bytes by part."""


def trainer_memory(
    jobs: Sequence[RunSizes], program_bytes: int, *, gpu: bool
) -> dict[str, dict[str, int]]:
    """Return the bytes of a trainer rank by part, on its `device` and its `host`.

    Without a GPU, everything is on the `host`.

    Args:
        jobs: The run, or the jobs of a sweep on this rank. Each job has its own state, and one job
            at a time makes a step.
        program_bytes: Host memory of the program and its libraries.
        gpu: Whether the rank computes on a GPU.
    """
    states = [each.state for each in jobs]
    device = dict(sum((Counter(state._asdict()) for state in states), Counter()))
    device["gradients"] = max(state.gradients for state in states)  # freed after each job's step
    kind = torch.device("cuda" if gpu else "cpu")
    device["step"] = max(_step(each, kind) for each in jobs)
    device["auxk_while_latents_are_dead"] = max(map(_auxk, jobs))
    device["new_start_of_dead_latents"] = max(_reinitialization(each, kind) for each in jobs)
    saved = [each for each in jobs if each.run.train.save_in_background]
    copies = [checkpoint_bytes(each, each.axis) for each in saved]
    encoded = max(
        state.weights // each.axis.replicas for state, each in zip(states, jobs, strict=True)
    )
    host = {
        "program": program_bytes,
        "batches_in_flight": _batches(jobs),
        "checkpoint_copies": sum(sorted(copies)[-_COPIES:]) + min(encoded, _ENCODED * PART_BYTES),
        "heap": 0 if gpu else _HEAP_BYTES,
    }
    return _by_place(host, device, gpu=gpu)


def producer_memory(sizes: RunSizes, program_bytes: int, *, gpu: bool) -> dict[str, Parts]:
    """Return the bytes of a producer's rank by part, as `trainer_memory`. Attention is left out."""
    host = {"program": program_bytes, "units": _UNITS * max(sizes.units) * sizes.row_bytes()}
    model = sizes.model.stored_bytes // sizes.run.tensor_parallel
    return _by_place(host, {"model": model}, gpu=gpu)


def index_memory(sizes: RunSizes, program_bytes: int, *, gpu: bool) -> dict[str, Parts]:
    """Return the bytes of an index worker's rank in stage 1 by part, as `trainer_memory`."""
    run, width = sizes.run, sizes.widths.d_in + sizes.widths.d_out
    dictionary = sizes.state.weights * run.processes.latent_shards
    block = _block(sizes, torch.device("cpu"), ENCODE_ROWS)
    device = {
        "weights": dictionary // run.index.latent_shards,
        "step": ENCODE_ROWS * width * _FP32 + block,
    }
    codes = int(max(sizes.units) * sizes.active * 2 * 12)
    return _by_place({"program": program_bytes, "codes": codes}, device, gpu=gpu)


def checkpoint_bytes(sizes: RunSizes, axis: LatentAxis = WHOLE) -> int:
    """Return a checkpoint's bytes: weights, both moments, running mean, counts of idle rows.

    If a rank's place (`axis`) is given, returns the bytes of its part. The replicas of a shard
    each save some of the shard's rows.
    """
    weights = state_bytes(sizes.run, sizes.widths, axis).weights
    tensors = 3 + bool(sizes.run.train.ema_decay)
    return (tensors * weights + 8 * sizes.run.sae.n_latents // axis.shards) // axis.replicas


def _by_place(host: Parts, device: Parts, *, gpu: bool) -> dict[str, Parts]:
    if gpu:
        return {"device": {"cuda": CUDA_BYTES, **device}, "host": host}
    return {"host": {**device, **host}}


def _step(sizes: RunSizes, device: torch.device) -> int:
    """Return the bytes of a step in addition to the state: rows, products, codes."""
    sae, rows, own = sizes.run.sae, sizes.replica_rows, sizes.rank_rows
    d_in, d_out = sizes.widths.d_in, sizes.widths.d_out
    product = PRODUCT_DTYPES[sizes.run.train.products].itemsize
    loaded = own * (d_in + (d_out if sizes.run.writes != sizes.run.reads else 0)) * _FP32
    read = rows * d_in * (_FP32 + (product if product < _FP32 else 0))
    written = rows * d_out * _FP32 + 3 * own * d_out * _FP32
    if not isinstance(sae, KSelectionConfig):
        return loaded + read + written + _DENSE_CHUNKS * block_size(DENSE_BYTES, device)
    return loaded + read + written + rows * sae.k * _ENTRY_BYTES + _block(sizes, device, rows)


def _auxk(sizes: RunSizes) -> int:
    """Return the bytes of AuxK's codes."""
    sae = sizes.run.sae
    if not isinstance(sae, KSelectionConfig):
        return 0
    return sizes.replica_rows * sae.auxk * _ENTRY_BYTES


def _reinitialization(sizes: RunSizes, device: torch.device) -> int:
    """Return the bytes with which a penalised recipe encodes a batch to reinitialize dead latents.

    They are a block of products and a block of pre-activations. They come on top of a step's
    memory, because malloc keeps both.
    """
    sae, rows = sizes.run.sae, sizes.replica_rows
    if isinstance(sae, KSelectionConfig):
        return 0
    products = rows * sae.n_latents // sizes.axis.shards * _FP32
    return 2 * min(block_size(CHUNK_BYTES, device), products)


def _block(sizes: RunSizes, device: torch.device, rows: int) -> int:
    """Return the bytes of a block of products, and of its encoder rows in the same precision."""
    sae, product = sizes.run.sae, PRODUCT_DTYPES[sizes.run.train.products].itemsize
    part = sae.group_size if sae.n_experts else sae.n_latents // sizes.axis.shards
    width = min(block_size(CHUNK_LATENTS, device), part)
    met = (
        rows * sae.preacts_per_row * width // (sae.n_latents * part)
        if sae.n_experts
        else rows * width
    )
    cast = width * sizes.widths.d_in * product if product < _FP32 else 0
    return min(block_size(CHUNK_BYTES, device), met * product) + cast


def _batches(jobs: Sequence[RunSizes]) -> int:
    """Return the bytes of batches in the queue, in their stored precision, and of blocks in use."""
    sizes, activations = jobs[0], jobs[0].run.activations
    sites = sites_of(jobs)
    width = sum(sizes.model.widths[site] for site in sites)
    # int8 rows become fp32 when they are read
    stored = DTYPES["fp32" if activations.dtype == "int8" else activations.dtype]
    streams = max(1, sizes.streams // sizes.run.processes.trainers)
    rows = rows_of_block(max(sizes.unit_rows), activations.block_rows)
    block = rows * (width * stored.itemsize + ORIGIN_BYTES * len(sites))
    batches = _BATCHES * sizes.rank_rows * width * stored.itemsize
    return batches + _BLOCKS * streams * activations.window_units * block
