"""Memory of each process by part. Peaks: parts that are never held together are not added up."""

import torch

from dist_sae.config.dictionary import CountsLatentsConfig
from dist_sae.data.shard import DTYPES, ORIGIN_BYTES
from dist_sae.dictionaries import PRODUCT_DTYPES
from dist_sae.dictionaries.penalised import CHUNK_BYTES as DENSE_BYTES
from dist_sae.index.encode import ENCODE_ROWS
from dist_sae.kernels.select import CHUNK_BYTES, CHUNK_LATENTS, at_once
from dist_sae.planning.basis import Basis
from dist_sae.producing.planner import row_bytes
from dist_sae.training.memory import state_bytes

CUDA_BYTES = 700 * 10**6
"""Memory of a CUDA context and its libraries on a GPU; an assumption."""
_FP32 = 4
_ENTRY_BYTES = 80  # of a code: value, row, latent, their sorts, gradients
_DENSE_CHUNKS = 10  # that a dense penalised step holds at once (`dictionaries.penalised`)
_BATCHES = 4  # `config.run.rows_ahead`: two wait, one is assembled, one is trained on
_BLOCKS = 3  # of a unit: one in use, one fetched, one of the next window
_UNITS = 6  # that a producer holds, copies included: two in work, and one that is being stored


def trainer_memory(basis: Basis, program_bytes: int, *, gpu: bool) -> dict[str, dict[str, int]]:
    """Bytes of a trainer rank by part, on its `device` and its `host`: one place without a GPU.

    Args:
        program_bytes: What the program itself takes on the host.
        gpu: Whether it computes on a GPU.
    """
    state = state_bytes(basis.run, basis.widths, basis.axis)
    device = dict(state._asdict()) | {"step": _step(basis, torch.device("cuda" if gpu else "cpu"))}
    host = {
        "program": program_bytes,
        "batches_in_flight": _batches(basis),
        "checkpoint_copy": _copy(basis, state.weights) if basis.run.train.save_in_background else 0,
    }
    if not gpu:
        return {"host": {**device, **host}}
    return {"device": {"cuda": CUDA_BYTES, **device}, "host": host}


def producer_memory(basis: Basis, program_bytes: int, *, gpu: bool) -> dict[str, dict[str, int]]:
    """Bytes of a producer's rank by part; see `trainer_memory`. Attention is left out."""
    run = basis.run
    stored = row_bytes(run.activations.dtype, basis.model.widths)
    biggest = max((*basis.unit_rows, *basis.heldout_unit_rows))
    model = basis.model.stored_bytes // run.tensor_parallel
    host = {"program": program_bytes, "units": _UNITS * biggest * stored}
    if not gpu:
        return {"host": {"model": model, **host}}
    return {"device": {"cuda": CUDA_BYTES, "model": model}, "host": host}


def index_memory(basis: Basis, program_bytes: int, *, gpu: bool) -> dict[str, dict[str, int]]:
    """Bytes of an index worker's rank in stage 1 by part; see `trainer_memory`."""
    run = basis.run
    dictionary = state_bytes(run, basis.widths, basis.axis).weights * run.processes.latent_shards
    of_rank = dictionary // run.index.latent_shards
    biggest = max((*basis.unit_rows, *basis.heldout_unit_rows))
    rows = ENCODE_ROWS * (basis.widths.d_in + basis.widths.d_out) * _FP32
    device = {"weights": of_rank, "step": rows + _block(basis, torch.device("cpu"), ENCODE_ROWS)}
    host = {"program": program_bytes, "codes": int(biggest * active(basis) * 2 * 12)}
    if not gpu:
        return {"host": {**device, **host}}
    return {"device": {"cuda": CUDA_BYTES, **device}, "host": host}


def active(basis: Basis) -> float:
    """Latents that are active on a row: k, or what a penalised recipe begins with."""
    sae = basis.run.sae
    if isinstance(sae, CountsLatentsConfig):
        return sae.k
    found: float = getattr(sae, "target_l0", None) or sae.l0_at_start(basis.widths.d_in)
    return min(found, sae.n_latents / 2)


def _step(basis: Basis, device: torch.device) -> int:
    """Memory of a step beyond the state: rows that are read and written, products, codes."""
    sae, rows, own = basis.run.sae, basis.replica_rows, basis.rank_rows
    d_in, d_out = basis.widths.d_in, basis.widths.d_out
    product = PRODUCT_DTYPES[basis.run.train.products].itemsize
    loaded = own * (d_in + (d_out if basis.run.writes != basis.run.reads else 0)) * _FP32
    read = rows * d_in * (_FP32 + (product if product < _FP32 else 0))
    written = rows * d_out * _FP32 + 3 * own * d_out * _FP32
    if not isinstance(sae, CountsLatentsConfig):
        chunks = _DENSE_CHUNKS * at_once(DENSE_BYTES, device)
        return loaded + read + written + chunks
    codes = rows * (sae.k + sae.auxk) * _ENTRY_BYTES  # as while latents are dead
    return loaded + read + written + codes + _block(basis, device, rows)


def _block(basis: Basis, device: torch.device, rows: int) -> int:
    """A block of products, and its part of the encoder in the product's precision."""
    sae, product = basis.run.sae, PRODUCT_DTYPES[basis.run.train.products].itemsize
    part = sae.together if sae.n_experts else sae.n_latents // basis.axis.shards
    width = min(at_once(CHUNK_LATENTS, device), part)
    met = (
        rows * sae.latents_met * width // (sae.n_latents * part) if sae.n_experts else rows * width
    )
    cast = width * basis.widths.d_in * product if product < _FP32 else 0
    return min(at_once(CHUNK_BYTES, device), met * product) + cast


def _batches(basis: Basis) -> int:
    """Batches that wait as they are stored, and blocks that are being read."""
    activations, run = basis.run.activations, basis.run
    sites = {site: basis.model.widths[site] for site in run.sites}
    is_int8 = activations.dtype == "int8"  # read as fp32
    itemsize = _FP32 if is_int8 else DTYPES[activations.dtype].itemsize
    width = sum(sites.values())
    batches = _BATCHES * basis.rank_rows * width * itemsize
    assert activations.streams is not None, "the basis has numbers"
    streams = max(1, activations.streams // run.processes.trainers)
    rows = min(activations.block_rows, max(basis.unit_rows))
    block = rows * (width * itemsize + ORIGIN_BYTES * len(sites))
    return batches + _BLOCKS * streams * activations.window_units * block


def _copy(basis: Basis, weights: int) -> int:
    """The copy of a rank's share of the state that is being stored."""
    tensors = 3 + bool(basis.run.train.ema_decay)
    idle = 8 * basis.run.sae.n_latents // basis.axis.shards
    return (tensors * weights + idle) // basis.axis.replicas
