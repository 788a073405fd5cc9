"""Bytes in the store, requests to the store, and the size of the activation set over time."""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

from dist_sae.checkpoint.layout import part_rows
from dist_sae.checkpoint.lease import RENEW_SECONDS
from dist_sae.config.dictionary import KSelectionConfig
from dist_sae.data.backlog import LOOK_EVERY_SECONDS
from dist_sae.data.shard import rows_of_block
from dist_sae.planning.memory import checkpoint_bytes
from dist_sae.planning.sizes import RunSizes, sites_of
from dist_sae.storage.s3 import MULTIPART_FROM_BYTES
from dist_sae.storage.s3 import PART_BYTES as S3_PART_BYTES

_BLOCK_BYTES = 4128  # overhead per block in a tar: headers, JSON, padding
_TAR_BYTES = 10_240  # the size of a tar is a multiple of this
_NUMBER_BYTES = 21  # per number of a shard's sum in a manifest
_MANIFEST_BYTES = 1200
_LATENT_BYTES, _EXAMPLE_BYTES, _ENTRY_BYTES, _ROW_BYTES = 120, 8, 5, 6  # of a compressed index


def unit_bytes(sizes: RunSizes, rows: int) -> int:
    """Return the bytes of a unit with this many rows: the shards of all sites and the manifest."""
    headers = _BLOCK_BYTES * _blocks(sizes, rows)
    contents = (rows * sizes.row_bytes([site]) + headers for site in sizes.model.widths)
    tars = sum(_TAR_BYTES * math.ceil(content / _TAR_BYTES) for content in contents)
    return tars + _manifest_bytes(sizes, rows)


def _manifest_bytes(sizes: RunSizes, rows: int) -> int:
    widths = sizes.model.widths
    blocks = 110 * _blocks(sizes, rows) * len(widths)
    return _MANIFEST_BYTES + _NUMBER_BYTES * sum(widths.values()) + blocks


def _blocks(sizes: RunSizes, rows: int) -> int:
    return math.ceil(rows / rows_of_block(rows, sizes.run.activations.block_rows))


def first_step_bytes(jobs: Sequence[RunSizes]) -> int:
    """Return the bytes that trainers must read before the first step of jobs that share ranks.

    The first batch mixes rows of all units in the first windows, so it needs the first block of
    each. The manifests are read twice, because the normaliser reads them too.
    """
    sizes, block_rows = jobs[0], jobs[0].run.activations.block_rows
    row = sizes.row_bytes(sites_of(jobs))
    return sizes.sharing * sum(
        min(rows, rows_of_block(rows, block_rows)) * row + 2 * _manifest_bytes(sizes, rows)
        for rows in sizes.unit_rows[: sizes.first_windows]
    )


def set_bytes(sizes: RunSizes) -> int:
    """Return the bytes of the whole activation set."""
    return sum(n * unit_bytes(sizes, rows) for rows, n in Counter(sizes.units).items())


def checkpoints_kept(sizes: RunSizes) -> int:
    """Return the number of checkpoints that remain at the end of the run."""
    train, steps = sizes.run.train, sizes.run.steps
    every = steps // train.keep_every_steps if train.keep_every_steps else 0
    return min(_saves(sizes), train.keep_checkpoints + every + train.keep_best)


def index_bytes(sizes: RunSizes) -> int:
    """Estimate the bytes of the index, from sizes of earlier indexes (docs/measured.md)."""
    index, sae, rows = sizes.run.index, sizes.run.sae, sum(sizes.units)
    rows = rows if index.rows == "all" else min(index.rows, rows)
    entries = rows * sizes.active
    share = {"all": 1.0, "none": 0.0}.get(str(index.postings))
    kept = float(index.postings) if share is None else share
    examples = min(entries, sae.n_latents * (index.examples + 10 * index.decile_examples))
    latents = sae.n_latents * (_LATENT_BYTES + 8 * index.neighbours + 16 * index.output_tokens)
    return int(
        latents + examples * _EXAMPLE_BYTES + entries * kept * _ENTRY_BYTES + rows * _ROW_BYTES
    )


def requests(jobs: Sequence[RunSizes], seconds: float = 0.0) -> dict[str, dict[str, int]]:
    """Return the numbers of requests of producers and trainers, by kind, without retries and waits.

    Args:
        jobs: The run, or the jobs of a sweep that share ranks. Jobs of a sweep read the rows once.
        seconds: Time of training, during which leases are renewed and ready units are counted.
    """
    sizes, run = jobs[0], jobs[0].run
    train, units = run.train, len(sizes.units)
    sites = sites_of(jobs)
    shard = unit_bytes(sizes, max(sizes.unit_rows)) // len(sizes.model.widths)
    puts = 1 if shard < MULTIPART_FROM_BYTES else math.ceil(shard / S3_PART_BYTES) + 2
    rows = max(each.run.rows for each in jobs)
    passes = train.max_passes * min(1.0, rows / (sizes.pass_rows * train.max_passes))
    blocks = sum(_blocks(sizes, rows) for rows in sizes.unit_rows)
    block = shard // _blocks(sizes, max(sizes.unit_rows))
    gets = math.ceil(block / S3_PART_BYTES) * len(sites)
    read = round(passes * sizes.sharing * (blocks * gets + len(sizes.unit_rows)))
    to_measure = bisect_left(list(accumulate(sizes.unit_rows)), train.normaliser_rows or 0) + 1
    renewals = len(jobs) * round(seconds / RENEW_SECONDS)
    saves = sum(_saves(each) for each in jobs)
    retired = len(sizes.unit_rows) if run.store.retention == "delete_consumed" else 0
    return {
        "producers": {  # puts claim and manifest; gets if the unit is done; lists claims, manifests
            "put": units * (2 + len(sizes.model.widths) * puts),
            "get": units,
            "list": 2 * units,
            "delete": units,
        },
        "trainers": {
            "put": sum(_saves(each) * (_parts(each) + 3) for each in jobs)
            + len(jobs) * len(sizes.unit_rows)
            + renewals,
            "get": read + retired + renewals + run.processes.trainers * to_measure,
            "list": 2 * saves + round(seconds / LOOK_EVERY_SECONDS),
            "delete": math.ceil(retired * len(sites) / 1000),
        },
    }


def _saves(sizes: RunSizes) -> int:
    return math.ceil(sizes.run.steps / sizes.run.train.save_every_steps)


def _parts(sizes: RunSizes) -> int:
    """Estimate the number of objects in a checkpoint. Every rank has a part of each tensor."""
    extra = 1 if isinstance(sizes.run.sae, KSelectionConfig) else 2
    row_bytes = 4 * max(sizes.widths.d_in, sizes.widths.d_out)
    whole = math.ceil(checkpoint_bytes(sizes) / (part_rows(row_bytes) * row_bytes))
    return whole + 3 * (3 + extra) * sizes.run.processes.trainers


def stored_over_time(sizes: RunSizes, producer_lead_units: int | None) -> dict[str, int]:
    """Return the bytes of the activation set at several shares of the run, given its retention.

    Args:
        sizes: The run.
        producer_lead_units: Most units that producers are ahead of the trainers. None if producers
            are done before training starts.
    """
    run, n = sizes.run, len(sizes.unit_rows)
    heldout = sum(unit_bytes(sizes, rows) for rows in sizes.heldout_unit_rows)
    per_unit = (set_bytes(sizes) - heldout) / n
    lead = min(n, producer_lead_units or n, run.store.max_ahead_units or n)
    kept_behind = 2 * run.train.save_every_steps * run.train.batch_rows / max(sizes.unit_rows)
    found = {}
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        read = min(1.0, run.rows / sizes.pass_rows * share) * n
        gone = max(0.0, read - kept_behind) if share < 1 else read
        gone = gone if run.store.retention == "delete_consumed" else 0.0
        found[f"at_{share:.0%}"] = int((min(n, read + lead) - gone) * per_unit) + heldout
    return found
