"""Simulations of a run as planned, and with one thing changed at a time, such as a slow store."""

import math
from typing import Any

from dist_sae.config.base import folder_of
from dist_sae.errors import ConfigError
from dist_sae.planning.rates import Rates
from dist_sae.planning.simulate import HOUR, Fleet, Simulation, plan_from_units
from dist_sae.planning.sizes import RunSizes

_UNITS_EACH = 2  # units per producer in the part of a long run that is simulated
_WINDOWS = 2  # minimum number of windows of every stream in that part


def make_fleet(sizes: RunSizes, rates: Rates) -> Fleet:
    """Return the processes of a run in which nothing goes wrong.

    Raises:
        ConfigError: The speed of a producer or of a step is unknown.
    """
    run, produced, step = sizes.run, rates.producer_rows_per_second, rates.step_seconds
    if produced is None or step is None:
        raise ConfigError(
            "--simulate: needs the speed of a producer and of a training step; pass --accelerator, "
            "--measure, or --bench with the output of bench produce and bench step"
        )
    return Fleet(
        run.processes.producers,
        max(sizes.unit_rows) / produced,
        step,
        run.train.batch_rows,
        min(run.rows, sizes.pass_rows),
        sizes.row_bytes(),
        rates.write_bytes_per_second or math.inf,
        rates.read_bytes_per_second or math.inf,
        in_folder=folder_of(run.store.activations) is not None,
        max_ahead_units=run.store.max_ahead_units,
        save_every_steps=run.train.save_every_steps,
        producer_begin_seconds=rates.producer_begin_seconds or 0.0,
        trainer_begin_seconds=rates.trainer_begin_seconds or 0.0,
        trainer_nodes=run.processes.trainers // run.cluster.trainer.ranks,
    )


def simulate(sizes: RunSizes, fleet: Fleet) -> dict[str, float]:
    """Simulate a run. Of a long run, only the first part is simulated, and the rest extrapolated.

    Returns:
        `total_seconds` of the whole run, and `producer_hours` until its last unit. For the
        simulated part: shares of the time in which trainers and producers work, and counts.
    """
    streams, windows = sizes.run.activations.streams, sizes.run.activations.window_units
    assert streams is not None, "the plan sets streams"
    wanted = max(_UNITS_EACH * fleet.producers, _WINDOWS * streams * windows)
    part = sizes.unit_rows[: math.ceil(wanted / (streams * windows)) * streams * windows]
    plan = plan_from_units(part, streams=streams, window_units=windows)
    found = Simulation(plan, fleet._replace(rows=min(fleet.rows, sum(part)))).outcome
    training = max(found.seconds - found.first_step_seconds, 1e-9)
    total = found.seconds + (fleet.rows - found.rows) * training / found.rows
    total += (sizes.run.rows - fleet.rows) / fleet.batch_rows * fleet.step_seconds
    whole = len(sizes.unit_rows) + len(sizes.heldout_unit_rows)
    producing = min(total * fleet.producers, whole * found.producer_seconds / found.units)
    return {
        "producers": fleet.producers,
        "total_seconds": total,
        "producer_hours": producing / HOUR,
        "trainers_work_share": found.rows / fleet.batch_rows * fleet.step_seconds / found.seconds,
        "producers_work_share": found.producer_busy_share,
        "simulated_units": found.units,
        "lost_units": found.lost_units,
        "preemptions": found.preemptions,
        "lost_nodes": found.lost_nodes,
        "requests_of_a_unit": found.requests / max(1, found.units),
    }


def scenarios(
    sizes: RunSizes, rates: Rates, *, spot_hours: float, node_days: float, slowdown: float
) -> dict[str, dict[str, float]]:
    """Simulate a run as planned, and with one thing changed at a time.

    Args:
        spot_hours: Mean life of a producer that can be preempted.
        node_days: Mean life of a trainer's node.
        slowdown: Factor on the time of requests and transfers.
    """
    fleet = make_fleet(sizes, rates)
    half, twice = max(1, fleet.producers // 2), 2 * fleet.producers
    changes: dict[str, dict[str, Any]] = {
        "as planned": {},
        f"{half:,} producers": {"producers": half},
        f"{twice:,} producers": {"producers": twice},
        f"producers live {spot_hours:g} h": {"producer_hours": spot_hours},
        f"a trainer node lives {node_days:g} days": {"node_hours": 24 * node_days},
        f"the store is {slowdown:g} times as slow": {"slowdown": slowdown},
    }
    return {name: simulate(sizes, fleet._replace(**of)) for name, of in changes.items()}
