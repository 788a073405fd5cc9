"""Recommended settings for a run of this size, each with its reason."""

import math
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from dist_sae.data.deal import choose_layout
from dist_sae.planning.basis import Basis
from dist_sae.planning.memory import trainer_memory
from dist_sae.planning.rates import Rates
from dist_sae.planning.traffic import step_traffic

_FILLED = 0.9  # largest share of a device's memory to plan for
# a producer's time per unit: below, queueing dominates; above, a lost pod loses too much
_UNIT_SECONDS = (5.0, 600.0)
_LEAST_BATCH = 4096
_MOST_DOUBLINGS = 20  # of the number of ranks, to make a dictionary fit


def advice(jobs: Sequence[Basis], rates: Rates, device_bytes: float | None) -> list[str]:
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


def fits(basis: Basis, shards: int, trainers: int) -> int:
    """Return the bytes that a rank's device would need with these numbers of ranks."""
    ranks = {"latent_shards": shards, "trainers": trainers}
    processes = basis.run.processes.model_copy(update=ranks)
    other = basis._replace(run=basis.run.model_copy(update={"processes": processes}))
    return sum(trainer_memory([other], 0, gpu=True)["device"].values())


def _ranks(basis: Basis, device_bytes: float) -> Iterator[str]:
    run, room = basis.run, _FILLED * device_bytes
    world, now = run.processes.trainers, run.processes.latent_shards

    def holds(shards: int, ranks: int) -> bool:
        return run.sae.can_shard_over(shards) and fits(basis, shards, ranks) <= room

    divisors = (shards for shards in range(1, world + 1) if world % shards == 0)
    fewest = next((shards for shards in divisors if holds(shards, world)), None)
    if fewest is None:
        worlds = (world << doubling for doubling in range(1, _MOST_DOUBLINGS))
        if more := next((n for n in worlds if n <= run.sae.n_latents and holds(n, n)), None):
            yield (
                f"processes.trainers: {world} ranks cannot hold it; {more}, with as many "
                f"latent_shards, can"
            )
        else:
            yield "processes.trainers: no number of ranks makes this dictionary fit"
        return
    held = fits(basis, fewest, world) / 1e9
    why = f"the fewest that fit: {held:,.1f} of {device_bytes / 1e9:,.0f} GB on a device"
    yield (
        f"processes.latent_shards: keep {now}, {why}"
        if fewest == now
        else f"processes.latent_shards: {fewest} x {world // fewest} replicas, {why}; fewer shards "
        f"gather fewer rows, more shards sum fewer gradients"
    )


def _batch(basis: Basis) -> Iterator[str]:
    run, sent = basis.run, step_traffic(basis)
    weights = sum(n for name, n in sent.items() if "gradients" in name and "gather" not in name)
    rows = sum(sent.values()) - weights
    if weights > rows and run.replicas > 1:
        yield (
            f"train.batch_rows: a step sends {weights / 1e6:,.0f} MB of gradients for "
            f"{rows / 1e6:,.0f} MB of rows; larger batches or more shards share them"
        )
    elif run.train.batch_rows < _LEAST_BATCH:
        said = "Adam and norms are paid per step"
        yield f"train.batch_rows: {said}; {_LEAST_BATCH} halve their share"


def _streams(basis: Basis) -> Iterator[str]:
    run, activations = basis.run, basis.run.activations
    if basis.streams % run.processes.trainers:
        wanted = choose_layout(
            np.asarray(basis.unit_rows),
            streams=None,
            window_units=activations.window_units,
            unit_rows=activations.unit_rows,
            trainers=run.processes.trainers,
            batch_rows=run.train.batch_rows,
        ).streams
        yield (
            f"activations.streams: {basis.streams} for {run.processes.trainers} ranks: ranks that "
            f"share a stream each read all of it; use {wanted}"
        )


def _units(basis: Basis, rates: Rates) -> Iterator[str]:
    rate, rows = rates.producer_rows_per_second, max(basis.unit_rows)
    if rate is None:
        return
    least, most = _UNIT_SECONDS
    seconds = rows / rate
    size = 2 ** round(math.log2(rate * (least if seconds < least else most)))
    size = max(512, min(size, sum(basis.unit_rows) // basis.first_windows))
    if not least <= seconds <= most and size != rows:
        why = "claims cost more than they save" if seconds < least else "a lost pod loses it"
        said = f"a unit takes a producer {seconds:,.2g} s, {why}"
        yield f"activations.unit_rows: {said}; use {size:,}"


def _ahead(basis: Basis) -> Iterator[str]:
    run, units = basis.run, basis.unit_rows
    begin = max(run.train.normaliser_rows or 0, run.sae.init_rows)
    least = min(len(units), run.least_ahead(begin, basis.first_windows, units))
    now = run.store.max_ahead_units
    if (now is None or now < least) and 2 * least < len(units):
        yield f"store.max_ahead_units: {2 * least} bounds the set; it must be {least} or more"


def _producers(basis: Basis, rates: Rates) -> Iterator[str]:
    if not (rates.step_seconds and rates.producer_rows_per_second):
        return
    wanted = basis.run.train.batch_rows / rates.step_seconds / rates.producer_rows_per_second
    now = basis.run.processes.producers
    if now < wanted:
        yield (
            f"processes.producers: {now} give {now / wanted:.0%} of the rows that trainers can "
            f"use; {math.ceil(wanted)} give all"
        )
