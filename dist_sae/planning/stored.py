"""Bytes in the store, requests to it, and how full it is over time."""

import math

from dist_sae.checkpoint.layout import PART_BYTES
from dist_sae.config.dictionary import CountsLatentsConfig
from dist_sae.dictionaries.axis import WHOLE
from dist_sae.planning.basis import Basis
from dist_sae.planning.memory import active
from dist_sae.producing.planner import row_bytes
from dist_sae.storage.s3 import MULTIPART_FROM_BYTES
from dist_sae.storage.s3 import PART_BYTES as S3_PART_BYTES
from dist_sae.training.memory import state_bytes

_BLOCK_BYTES = 4128  # of a tar: headers, JSON, padding
_TAR_BYTES = 10_240  # a tar is a multiple of this
_NUMBER_BYTES = 21  # of a number of a shard's sum in a manifest
_MANIFEST_BYTES = 1200
_LATENT_BYTES, _EXAMPLE_BYTES, _ENTRY_BYTES, _ROW_BYTES = 120, 8, 5, 6  # of an index, compressed


def unit_bytes(basis: Basis, rows: int) -> int:
    """Bytes of a unit of so many rows: the shards of all sites, and the manifest."""
    activations, widths = basis.run.activations, basis.model.widths
    blocks = math.ceil(rows / activations.block_rows)
    manifest = _MANIFEST_BYTES + _NUMBER_BYTES * sum(widths.values()) + 110 * blocks * len(widths)
    return manifest + sum(
        _TAR_BYTES
        * math.ceil(
            (rows * row_bytes(activations.dtype, {site: width}) + _BLOCK_BYTES * blocks)
            / _TAR_BYTES
        )
        for site, width in widths.items()
    )


def set_bytes(basis: Basis) -> int:
    """Bytes of the whole activation set."""
    return sum(unit_bytes(basis, rows) for rows in (*basis.unit_rows, *basis.heldout_unit_rows))


def checkpoint_bytes(basis: Basis) -> int:
    """Bytes of a checkpoint: weights, both moments, the running mean, the counts of idle rows."""
    weights = state_bytes(basis.run, basis.widths, WHOLE).weights
    tensors = 3 + bool(basis.run.train.ema_decay)
    return tensors * weights + 8 * basis.run.sae.n_latents


def checkpoints_kept(basis: Basis) -> int:
    """Checkpoints at the end of the run."""
    train, steps = basis.run.train, basis.run.steps
    saved = -(-steps // train.save_every_steps)
    every = steps // train.keep_every_steps if train.keep_every_steps else 0
    return min(saved, train.keep_checkpoints + every + train.keep_best)


def index_bytes(basis: Basis) -> int:
    """Bytes of the latent index, about: compressed sizes of earlier indexes (docs/measured.md)."""
    index, sae = basis.run.index, basis.run.sae
    rows = basis.stored_rows if index.rows == "all" else min(index.rows, basis.stored_rows)
    entries = rows * active(basis)
    share = {"all": 1.0, "none": 0.0}.get(str(index.postings))
    kept = float(index.postings) if share is None else share
    examples = min(entries, sae.n_latents * (index.examples + 10 * index.decile_examples))
    latents = sae.n_latents * (_LATENT_BYTES + 8 * index.neighbours + 16 * index.output_tokens)
    return int(
        latents + examples * _EXAMPLE_BYTES + entries * kept * _ENTRY_BYTES + rows * _ROW_BYTES
    )


def requests(basis: Basis) -> dict[str, dict[str, int]]:
    """Requests of producers and trainers, by kind; those of retries and upkeep are left out."""
    run = basis.run
    activations, train, trainers = run.activations, run.train, run.processes.trainers
    units = len(basis.unit_rows) + len(basis.heldout_unit_rows)
    sites = len(basis.model.widths)
    shard = unit_bytes(basis, max(basis.unit_rows)) // sites
    puts = 1 if shard < MULTIPART_FROM_BYTES else math.ceil(shard / S3_PART_BYTES) + 2
    producers = {  # claim, manifest; is it done?; both pages
        "put": units * (2 + sites * puts),
        "get": units,
        "list": 2 * units,
        "delete": units,
    }
    read_share = min(1.0, run.rows / (basis.pass_rows * train.max_passes))
    passes = train.max_passes * read_share
    assert activations.streams is not None, "the basis has numbers"
    sharing = max(1, trainers // activations.streams)  # ranks that read all of a stream
    blocks = sum(math.ceil(rows / activations.block_rows) for rows in basis.unit_rows)
    block = shard * activations.block_rows // max(basis.unit_rows)
    gets = math.ceil(block / S3_PART_BYTES) * len(run.sites)
    saves = -(-run.steps // train.save_every_steps)
    tensors = _tensors(basis)
    parts = math.ceil(checkpoint_bytes(basis) / PART_BYTES) + tensors * trainers
    retired = len(basis.unit_rows) if run.store.retention == "delete_consumed" else 0
    return {
        "producers": producers,
        "trainers": {
            "put": saves * (parts + 3) + len(basis.unit_rows),
            "get": round(passes * sharing * (blocks * gets + len(basis.unit_rows))) + retired,
            "list": saves * 2,
            "delete": math.ceil(retired * len(run.sites) / 1000),
        },
    }


def _tensors(basis: Basis) -> int:
    """Tensors of a checkpoint that every rank has a part of."""
    extra = 1 if isinstance(basis.run.sae, CountsLatentsConfig) else 2
    return 3 * (3 + extra)


def stored_over_time(basis: Basis, producer_lead_units: int | None) -> dict[str, int]:
    """Bytes of the activation set when a share of the run is done, with its retention.

    Args:
        producer_lead_units: Units that producers are ahead of the trainers, at most; None: they
            are done before the trainers have begun.
    """
    run, units = basis.run, basis.unit_rows
    per_unit = sum(unit_bytes(basis, rows) for rows in units) / len(units)
    lead = min(
        len(units), producer_lead_units or len(units), run.store.max_ahead_units or len(units)
    )
    kept_behind = 2 * run.train.save_every_steps * run.train.batch_rows / max(units)
    deletes = run.store.retention == "delete_consumed"
    heldout = sum(unit_bytes(basis, rows) for rows in basis.heldout_unit_rows)
    found = {}
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        read = min(1.0, run.rows / basis.pass_rows * share) * len(units)
        made = min(len(units), read + lead)
        gone = (max(0.0, read - kept_behind) if share < 1 else read) * deletes
        found[f"at_{share:.0%}"] = int((made - gone) * per_unit) + heldout
    return found
