"""Cells of decoder directions, so that nearest latents are looked for in few of them.

A cell is the latents that are nearest to one of some centroids, which are found by spherical
k-means on evenly spaced latents. Cells are made once for a dictionary and stored; whoever uses the
stored ones finds the same neighbours.

    <folder>/cells-<begin of its sha256>.safetensors
    <folder>/cells.json                               sealed, last
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
"""Width up to which all latents are compared with all."""
PROBES = 64
"""Cells that a latent is compared with."""
_SAMPLE = 32  # latents for each centroid
SAMPLE_BYTES = 512 * 2**20
"""Most bytes of directions that centroids are found on."""
_ROUNDS = 6


class CellsRecord(Record):
    """`cells.json`."""

    schema_version: Literal[1] = 1
    checkpoint: str
    """Digest of the checkpoint."""
    data: Stored


class Cells(NamedTuple):
    """A division of all latents."""

    centroids: Float[Tensor, "cells d"]
    """Unit directions."""
    cell_of: Int[Tensor, " n_latents"]
    """Int32."""

    def nearest(self, queries: Float[Tensor, "q d"], kernels: Kernels) -> Int[Tensor, "q probes"]:
        """The cells to look into for each query."""
        return _nearest(queries, self.centroids, min(PROBES, len(self.centroids)), kernels)


@cache
def kernels_on(device: torch.device) -> Kernels:
    """The kernels for a device; the choice is logged once."""
    return choose_kernels("auto", device)


def make_cells(
    checkpoint: Checkpoint,
    device: torch.device | None = None,
    alive: Callable[[], None] = lambda: None,
) -> Cells:
    """Divide the latents of a checkpoint into 2 to 4 sqrt(n_latents) cells.

    Args:
        checkpoint: The dictionary.
        device: Computes them; the CPU if None.
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


def stored_cells(
    store: ObjectStore,
    folder: str,
    checkpoint: Checkpoint,
    device: torch.device | None = None,
    alive: Callable[[], None] = lambda: None,
) -> Cells | None:
    """The cells of a dictionary, which are made and stored if they are not there.

    Args:
        store: Takes the objects.
        folder: Prefix of their keys, with a slash at its end.
        checkpoint: The dictionary.
        device: Computes them; the CPU if None.
        alive: As in `make_cells`.

    Returns:
        None for a dictionary so narrow that all latents are compared with all.

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
        logger.warning("%s; the cells are made anew", exc)
        damaged = True
    cells = make_cells(checkpoint, device, alive)
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
        raise CorruptObjectError("is of another checkpoint", url=store.url, key=key)
    return Cells(**safetensors.torch.load(read_stored(store, record.data)))


def _sample(decoder: Decoder, count: int) -> Float[Tensor, "sample d"]:
    """Directions of evenly spaced latents."""
    latents = torch.linspace(0, decoder.n_latents - 1, count, dtype=torch.float64).long()
    found = []
    for first, part in decoder.parts():
        here = latents[(latents >= first) & (latents < first + len(part))] - first
        found.append(directions(part[here]))
    return torch.cat(found)


def _centroids(
    sample: Float[Tensor, "sample d"], n_cells: int, kernels: Kernels
) -> Float[Tensor, "cells d"]:
    """Spherical k-means."""
    chosen = torch.randperm(len(sample), generator=torch.Generator().manual_seed(0))[:n_cells]
    centroids = sample[chosen.to(sample.device)]
    every, ones = torch.arange(len(sample), device=sample.device), sample.new_ones(len(sample))
    for _ in range(_ROUNDS):
        nearest = _nearest(sample, centroids, 1, kernels)[:, 0]
        sums = kernels.sum_by_latent(ones, Entries(nearest, every, n_cells), sample)
        is_empty = ~sums.any(1)  # of latents, or of all but rows of zeros
        centroids = torch.where(is_empty[:, None], centroids, directions(sums))
    return centroids


def _nearest(
    queries: Float[Tensor, "q d"], centroids: Float[Tensor, "cells d"], k: int, kernels: Kernels
) -> Int[Tensor, "q k"]:
    centroids = centroids.to(queries.device)
    blocks = select.products(queries, centroids, torch.float32)
    no_bias = torch.zeros(len(centroids), device=queries.device)
    return from_keys(select.topk_keys(blocks, len(queries), no_bias, k, kernels))[1]
