"""Settings that a run's sizes suggest, each with its reason."""

import math

import torch

from dist_sae.data.deal import choose_layout
from dist_sae.planning.basis import Basis
from dist_sae.planning.memory import trainer_memory
from dist_sae.planning.rates import Rates
from dist_sae.planning.traffic import step_traffic

_FILLED = 0.9  # of a device's memory, at most
_UNIT_SECONDS = (5.0, 600.0)  # of a producer for a unit: less is queueing, more is lost with a pod
_LEAST_BATCH = 4096


def advice(basis: Basis, rates: Rates, device_bytes: float | None) -> list[str]:
    """Advise on `latent_shards`, batch, streams, unit size and `max_ahead_units`.

    Args:
        device_bytes: Memory of a rank's device; None if it is not known.
    """
    said = [*_ranks(basis, device_bytes), *_batch(basis), *_streams(basis), *_units(basis, rates)]
    return [*said, *_ahead(basis), *_producers(basis, rates)]


def fits(basis: Basis, shards: int, trainers: int) -> int:
    """Bytes on the device of a rank, with other numbers of ranks."""
    processes = basis.run.processes.model_copy(
        update={"latent_shards": shards, "trainers": trainers}
    )
    run = basis.run.model_copy(update={"processes": processes})
    return sum(trainer_memory(basis._replace(run=run), 0, gpu=True)["device"].values())


def _ranks(basis: Basis, device_bytes: float | None) -> list[str]:
    if device_bytes is None:
        return []
    run, room = basis.run, _FILLED * device_bytes
    world = run.processes.trainers
    options = [s for s in range(1, world + 1) if world % s == 0 and run.sae.divides_over(s)]
    fitting = next((s for s in options if fits(basis, s, world) <= room), None)
    now = run.processes.latent_shards
    if fitting is None:
        more = world
        while fits(basis, more, more) > room or not run.sae.divides_over(more):
            more *= 2
            if more > run.sae.n_latents:
                return ["processes.trainers: no number of ranks makes this dictionary fit"]
        return [
            f"processes.trainers: {world} ranks cannot hold it; {more}, with as many "
            f"latent_shards, can"
        ]
    held = fits(basis, fitting, world)
    why = f"the fewest that fit: {held / 1e9:,.1f} of {device_bytes / 1e9:,.0f} GB on a device"
    if fitting == now:
        return [f"processes.latent_shards: keep {now}, {why}"]
    return [
        f"processes.latent_shards: {fitting} x {world // fitting} replicas, {why}; fewer shards "
        f"gather fewer rows, more shards sum fewer gradients"
    ]


def _batch(basis: Basis) -> list[str]:
    run = basis.run
    sent = step_traffic(basis)
    of_rows = sum(n for name, n in sent.items() if "gradients" not in name or "gather" in name)
    of_weights = sum(sent.values()) - of_rows
    if of_weights > of_rows and run.replicas > 1:
        return [
            f"train.batch_rows: a step sends {of_weights / 1e6:,.0f} MB of gradients for "
            f"{of_rows / 1e6:,.0f} MB of rows; larger batches or more shards share them"
        ]
    if run.train.batch_rows < _LEAST_BATCH:
        return [
            f"train.batch_rows: Adam and norms are paid per step; {_LEAST_BATCH} halve their share"
        ]
    return []


def _streams(basis: Basis) -> list[str]:
    run = basis.run
    streams, trainers = run.activations.streams or 1, run.processes.trainers
    if streams % trainers == 0:
        return []
    rows = torch.tensor(basis.unit_rows).numpy()
    wanted = choose_layout(
        rows,
        streams=None,
        window_units=run.activations.window_units,
        unit_rows=run.activations.unit_rows,
        trainers=trainers,
        batch_rows=run.train.batch_rows,
    ).streams
    return [
        f"activations.streams: {streams} for {trainers} ranks: ranks that share a stream each read "
        f"all of it; use {wanted}"
    ]


def _units(basis: Basis, rates: Rates) -> list[str]:
    rate, rows = rates.producer_rows_per_second, max(basis.unit_rows)
    if rate is None:
        return []
    least, most = _UNIT_SECONDS
    seconds = rows / rate
    if least <= seconds <= most:
        return []
    size = 2 ** round(math.log2(rate * (least if seconds < least else most)))
    streams = (basis.run.activations.streams or 1) * basis.run.activations.window_units
    size = max(512, min(size, sum(basis.unit_rows) // streams))
    why = "claims cost more than they save" if seconds < least else "a lost pod loses it"
    if size == rows:
        return []
    return [f"activations.unit_rows: a unit takes a producer {seconds:,.2g} s, {why}; use {size:,}"]


def _ahead(basis: Basis) -> list[str]:
    run = basis.run
    first = (run.activations.streams or 1) * run.activations.window_units
    begin = max(run.train.normaliser_rows or 0, run.sae.init_rows)
    least = min(len(basis.unit_rows), run.least_ahead(begin, first, basis.unit_rows))
    now = run.store.max_ahead_units
    if now is not None and now >= least:
        return []
    wanted = min(len(basis.unit_rows), 2 * least)
    if wanted == len(basis.unit_rows):
        return []
    return [f"store.max_ahead_units: {wanted} bounds the set; it must be {least} or more"]


def _producers(basis: Basis, rates: Rates) -> list[str]:
    if not (rates.step_seconds and rates.producer_rows_per_second):
        return []
    wanted = basis.run.train.batch_rows / rates.step_seconds / rates.producer_rows_per_second
    now = basis.run.processes.producers
    if now >= wanted:
        return []
    return [
        f"processes.producers: {now} give {now / wanted:.0%} of the rows that trainers can use; "
        f"{math.ceil(wanted)} give all"
    ]
