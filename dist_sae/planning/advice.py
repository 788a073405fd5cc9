"""Recommended settings for a run of this size, each with its reason."""

import math
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from dist_sae.data.deal import choose_layout
from dist_sae.planning.memory import trainer_memory
from dist_sae.planning.rates import Rates
from dist_sae.planning.sizes import RunSizes
from dist_sae.planning.traffic import step_traffic

_FILLED = 0.9  # largest share of a device's memory to plan for
# a producer's time per unit: below, queueing dominates; above, a lost pod loses too much
_UNIT_SECONDS = (5.0, 600.0)
_LEAST_BATCH = 4096
_MOST_DOUBLINGS = 20  # of the number of ranks, to make a dictionary fit


def advice(jobs: Sequence[RunSizes], rates: Rates, device_bytes: float | None) -> list[str]:
    """Advise on `latent_shards`, batch, streams, unit size, `max_ahead_units` and producers.

    Args:
        jobs: A run, or the jobs of a sweep that share ranks. Sweeps get no advice on shards.
        rates: Speeds of single processes.
        device_bytes: Memory of a rank's device; None if unknown.
    """
    first = jobs[0]
    ranks = _ranks(first, device_bytes) if device_bytes and len(jobs) == 1 else ()
    of_rates = _units(first, rates), _producers(first, rates)
    return list(chain(ranks, _batch(first), _streams(first), _ahead(first), *of_rates))


def needed_bytes(sizes: RunSizes, shards: int, trainers: int) -> int:
    """Return the bytes that a rank's device would need with these numbers of ranks."""
    ranks = {"latent_shards": shards, "trainers": trainers}
    processes = sizes.run.processes.model_copy(update=ranks)
    other = sizes._replace(run=sizes.run.model_copy(update={"processes": processes}))
    return sum(trainer_memory([other], 0, gpu=True)["device"].values())


def _ranks(sizes: RunSizes, device_bytes: float) -> Iterator[str]:
    run, room = sizes.run, _FILLED * device_bytes
    world, now = run.processes.trainers, run.processes.latent_shards

    def fits(shards: int, ranks: int) -> bool:
        return run.sae.can_shard_over(shards) and needed_bytes(sizes, shards, ranks) <= room

    divisors = (shards for shards in range(1, world + 1) if world % shards == 0)
    fewest = next((shards for shards in divisors if fits(shards, world)), None)
    if fewest is None:
        worlds = (world << doubling for doubling in range(1, _MOST_DOUBLINGS))
        if more := next((n for n in worlds if n <= run.sae.n_latents and fits(n, n)), None):
            yield (
                f"processes.trainers: the dictionary does not fit on {world} ranks; use {more} "
                f"ranks and {more} latent_shards"
            )
        else:
            yield "processes.trainers: no number of ranks makes this dictionary fit"
        return
    needed = needed_bytes(sizes, fewest, world) / 1e9
    why = f"the fewest that fit: {needed:,.1f} of {device_bytes / 1e9:,.0f} GB per device"
    yield (
        f"processes.latent_shards: keep {now}, {why}"
        if fewest == now
        else f"processes.latent_shards: use {fewest} ({world // fewest} replicas), {why}; fewer "
        f"shards gather fewer rows, more shards sum fewer gradients"
    )


def _batch(sizes: RunSizes) -> Iterator[str]:
    run, sent = sizes.run, step_traffic(sizes)
    weights = sum(n for name, n in sent.items() if "gradients" in name and "gather" not in name)
    rows = sum(sent.values()) - weights
    if weights > rows and run.replicas > 1:
        yield (
            f"train.batch_rows: a step sends {weights / 1e6:,.0f} MB of gradients for "
            f"{rows / 1e6:,.0f} MB of rows; larger batches or more shards reduce the "
            f"gradients' share"
        )
    elif run.train.batch_rows < _LEAST_BATCH:
        yield (
            f"train.batch_rows: Adam and the norms cost as much per step at any batch size; "
            f"{_LEAST_BATCH} rows cut their cost per row to "
            f"{run.train.batch_rows / _LEAST_BATCH:.0%}"
        )


def _streams(sizes: RunSizes) -> Iterator[str]:
    run, activations = sizes.run, sizes.run.activations
    if sizes.streams % run.processes.trainers:
        wanted = choose_layout(
            np.asarray(sizes.unit_rows),
            streams=None,
            window_units=activations.window_units,
            unit_rows=activations.unit_rows,
            trainers=run.processes.trainers,
            batch_rows=run.train.batch_rows,
        ).streams
        yield (
            f"activations.streams: {sizes.streams} is not a multiple of the "
            f"{run.processes.trainers} ranks, and ranks that share a stream each read all of it; "
            f"use {wanted}"
        )


def _units(sizes: RunSizes, rates: Rates) -> Iterator[str]:
    rate, rows = rates.producer_rows_per_second, max(sizes.unit_rows)
    if rate is None:
        return
    least, most = _UNIT_SECONDS
    seconds = rows / rate
    size = 2 ** round(math.log2(rate * (least if seconds < least else most)))
    size = max(512, min(size, sum(sizes.unit_rows) // sizes.first_windows))
    if not least <= seconds <= most and size != rows:
        why = "claims cost more than they save" if seconds < least else "a lost pod loses too much"
        yield (
            f"activations.unit_rows: a unit takes a producer {seconds:,.2g} s, so {why}; "
            f"use {size:,}"
        )


def _ahead(sizes: RunSizes) -> Iterator[str]:
    run, units = sizes.run, sizes.unit_rows
    begin = max(run.train.normaliser_rows or 0, run.sae.init_rows)
    least = min(len(units), run.least_ahead(begin, sizes.first_windows, units))
    now = run.store.max_ahead_units
    if (now is None or now < least) and 2 * least < len(units):
        yield (
            f"store.max_ahead_units: {2 * least} bounds the activation set; the minimum is {least}"
        )


def _producers(sizes: RunSizes, rates: Rates) -> Iterator[str]:
    if not (rates.step_seconds and rates.producer_rows_per_second):
        return
    wanted = sizes.run.train.batch_rows / rates.step_seconds / rates.producer_rows_per_second
    now = sizes.run.processes.producers
    if now < wanted:
        yield (
            f"processes.producers: with {now}, trainers get {now / wanted:.0%} of the rows that "
            f"they can use; with {math.ceil(wanted)}, all"
        )
