"""Cells of decoder directions, which limit the search for nearest latents to a few cells.

Spherical k-means on evenly spaced latents finds the centroids. A cell is the set of latents that
are nearest to one centroid. Cells are computed once per dictionary and stored, so that all workers
find the same neighbors.

    <folder>/cells-<first 16 digits of its sha256>.safetensors
    <folder>/cells.json                                         sealed, written last
"""

import hashlib
import logging
import math
from collections.abc import Callable
from functools import cache
from typing import Literal, NamedTuple

import safetensors.torch
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dist_sae.checkpoint.layout import Checkpoint
from dist_sae.errors import CorruptObjectError, ObjectNotFoundError
from dist_sae.index.decoder import Decoder, directions
from dist_sae.index.layout import Stored, read_stored
from dist_sae.kernels import Entries, Kernels, select
from dist_sae.kernels.choice import choose_kernels
from dist_sae.kernels.keys import from_keys
from dist_sae.storage import ObjectStore
from dist_sae.storage.records import Record, read_record, seal

logger = logging.getLogger(__name__)

EXACT_LATENTS = 131_072
"""Widest dictionary in which every latent is compared with all others, without cells."""
PROBES = 64
"""Number of cells that a latent is compared with."""
_SAMPLE = 32  # sampled latents per centroid
SAMPLE_BYTES = 512 * 2**20
"""Most bytes of sampled directions for k-means."""
_ROUNDS = 6


class CellsRecord(Record):
    """The content of `cells.json`."""

    schema_version: Literal[1] = 1
    checkpoint: str
    """Digest of the checkpoint."""
    data: Stored


class Cells(NamedTuple):
    """A division of all latents into cells."""

    centroids: Float[Tensor, "cells d"]
    """Centroids, of unit length."""
    cell_of: Int[Tensor, " n_latents"]
    """Cell of each latent (int32)."""

    def nearest(self, queries: Float[Tensor, "q d"], kernels: Kernels) -> Int[Tensor, "q probes"]:
        """Return the cells to search for each query, nearest centroid first."""
        return _nearest(queries, self.centroids, min(PROBES, len(self.centroids)), kernels)


@cache
def kernels_on(device: torch.device) -> Kernels:
    """Choose the kernels for a device. Cached, so that the choice is logged once."""
    return choose_kernels("auto", device)


def compute_cells(
    checkpoint: Checkpoint,
    device: torch.device | None = None,
    alive: Callable[[], None] = lambda: None,
) -> Cells:
    """Divide the latents of a checkpoint into 2 to 4 sqrt(n_latents) cells.

    Args:
        checkpoint: The checkpoint of the dictionary.
        device: Device to compute on; the CPU if None.
        alive: Called before each part of the decoder.

    Raises:
        CorruptObjectError: The checkpoint is damaged.
    """
    decoder, device = Decoder(checkpoint, alive), device or torch.device("cpu")
    kernels = kernels_on(device)
    n_cells = 2 ** math.ceil(math.log2(2 * math.sqrt(decoder.n_latents)))
    n_sample = min(decoder.n_latents, n_cells * _SAMPLE, SAMPLE_BYTES // (4 * decoder.d_out))
    centroids = _centroids(_sample(decoder, n_sample).to(device), min(n_cells, n_sample), kernels)
    cell_of = torch.empty(decoder.n_latents, dtype=torch.int32)
    for first, part in decoder.directions():
        nearest = _nearest(part.to(device), centroids, 1, kernels)
        cell_of[first : first + len(part)] = nearest[:, 0].int().cpu()
    return Cells(centroids.cpu(), cell_of)


def load_or_compute_cells(
    store: ObjectStore,
    folder: str,
    checkpoint: Checkpoint,
    device: torch.device | None = None,
    alive: Callable[[], None] = lambda: None,
) -> Cells | None:
    """Load the cells of a dictionary. Compute and store them first if they do not exist.

    Args:
        store: The store of the cells.
        folder: Prefix of the keys, with a trailing slash.
        checkpoint: The checkpoint of the dictionary.
        device: Device to compute on; the CPU if None.
        alive: Called before each part of the decoder.

    Returns:
        The cells, or None for a dictionary of at most `EXACT_LATENTS` latents, which needs none.

    Raises:
        CorruptObjectError: The checkpoint is damaged.
    """
    if Decoder(checkpoint).n_latents <= EXACT_LATENTS:
        return None
    key, damaged = f"{folder}cells.json", False
    try:
        return _load(store, key, checkpoint)
    except ObjectNotFoundError:
        pass
    except CorruptObjectError as exc:
        logger.warning("%s; recomputing the cells", exc)
        damaged = True
    cells = compute_cells(checkpoint, device, alive)
    data = safetensors.torch.save(cells._asdict())
    sha256 = hashlib.sha256(data).hexdigest()
    stored = Stored(key=f"{folder}cells-{sha256[:16]}.safetensors", bytes=len(data), sha256=sha256)
    store.put(stored.key, data)
    record = CellsRecord(checkpoint=checkpoint.digest, data=stored)
    if store.put(key, seal(record), if_absent=not damaged):
        return cells
    return _load(store, key, checkpoint)  # another worker was first


def _load(store: ObjectStore, key: str, checkpoint: Checkpoint) -> Cells:
    record = read_record(CellsRecord, store, key, within=key.rpartition("/")[0])
    if record.checkpoint != checkpoint.digest:
        raise CorruptObjectError("belongs to another checkpoint", url=store.url, key=key)
    return Cells(**safetensors.torch.load(read_stored(store, record.data)))


def _sample(decoder: Decoder, count: int) -> Float[Tensor, "sample d"]:
    """Return the directions of evenly spaced latents."""
    latents = torch.linspace(0, decoder.n_latents - 1, count, dtype=torch.float64).long()
    found = []
    for first, part in decoder.parts():
        here = latents[(latents >= first) & (latents < first + len(part))] - first
        found.append(directions(part[here]))
    return torch.cat(found)


def _centroids(
    sample: Float[Tensor, "sample d"], n_cells: int, kernels: Kernels
) -> Float[Tensor, "cells d"]:
    """Run spherical k-means."""
    chosen = torch.randperm(len(sample), generator=torch.Generator().manual_seed(0))[:n_cells]
    centroids = sample[chosen.to(sample.device)]
    every, ones = torch.arange(len(sample), device=sample.device), sample.new_ones(len(sample))
    for _ in range(_ROUNDS):
        nearest = _nearest(sample, centroids, 1, kernels)[:, 0]
        sums = kernels.sum_by_latent(ones, Entries(nearest, every, n_cells), sample)
        is_empty = ~sums.any(1)  # cells without latents, or with rows of zeros only
        centroids = torch.where(is_empty[:, None], centroids, directions(sums))
    return centroids


def _nearest(
    queries: Float[Tensor, "q d"], centroids: Float[Tensor, "cells d"], k: int, kernels: Kernels
) -> Int[Tensor, "q k"]:
    centroids = centroids.to(queries.device)
    blocks = select.products(queries, centroids, torch.float32)
    no_bias = torch.zeros(len(centroids), device=queries.device)
    return from_keys(select.topk_keys(blocks, len(queries), no_bias, k, kernels))[1]
