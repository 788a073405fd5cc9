"""A run's forecast as one table: what `dist-sae estimate` prints."""

import math
from typing import Any

from dist_sae.planning import memory, stored, traffic
from dist_sae.planning.advice import advice
from dist_sae.planning.basis import Basis
from dist_sae.planning.cost import Prices, cost_of
from dist_sae.planning.rates import ACCELERATORS, Rates
from dist_sae.planning.risk import risk_of
from dist_sae.producing.planner import row_bytes


def estimate(
    basis: Basis,
    rates: Rates,
    *,
    program_bytes: int,
    trainer_bytes: int,
    accelerator: str | None = None,
    prices: Prices | None = None,
) -> dict[str, Any]:
    """Forecast a run.

    Args:
        basis: The run's sizes.
        rates: Of single processes.
        program_bytes: Memory of a program with its libraries, on the host.
        trainer_bytes: The same of a trainer, which has more of them.
        accelerator: Key of `ACCELERATORS`, or None for CPUs.
        prices: For the cost; without them none is told.

    Returns:
        Sections of numbers by name; units are in the names.
    """
    run, gpu = basis.run, accelerator is not None
    units, heldout = basis.unit_rows, basis.heldout_unit_rows
    asked = stored.requests(basis)
    pace = pace_of(basis, rates)
    told: dict[str, Any] = {
        "rows": {
            "known_from": basis.source,
            "train_rows": sum(units),
            "heldout_rows": sum(heldout),
            "trained_rows": run.steps * run.train.batch_rows,
            "steps": run.steps,
            "passes": run.rows / basis.pass_rows,
            "units": len(units) + len(heldout),
            "unit_rows": max(units),
            "streams": run.activations.streams,
        },
        "memory_of_a_trainer": _with_sum(memory.trainer_memory(basis, trainer_bytes, gpu=gpu)),
        "memory_of_a_producer": _with_sum(memory.producer_memory(basis, program_bytes, gpu=gpu)),
    }
    if run.index.workers:
        told["memory_of_an_index_worker"] = _with_sum(
            memory.index_memory(basis, program_bytes, gpu=gpu)
        )
    told |= {
        "stored": {
            "row_bytes": row_bytes(run.activations.dtype, basis.model.widths),
            "set_bytes": stored.set_bytes(basis),
            "checkpoint_bytes": stored.checkpoint_bytes(basis),
            "checkpoints_bytes": stored.checkpoint_bytes(basis) * stored.checkpoints_kept(basis),
            "index_bytes": stored.index_bytes(basis) if run.index.workers else 0,
        },
        "set_over_time": {
            f"{name}_bytes": size
            for name, size in stored.stored_over_time(basis, pace.get("lead_units")).items()
        },
        "requests": {f"{who}_{kind}": n for who, of in asked.items() for kind, n in of.items()},
        "network_of_a_rank_and_step": {
            **{f"{name}_bytes": n for name, n in traffic.step_traffic(basis).items()},
            "auxk_bytes_while_latents_are_dead": traffic.auxk_traffic(basis),
        },
        "pace": pace | {"rates_from": "; ".join(rates.sources) or _UNKNOWN},
        "pods": pods_of(basis),
    }
    if prices and "total_seconds" in pace:
        told["cost"] = _cost(basis, prices, told)
    told["risk"] = risk_of(basis)
    there = ACCELERATORS[accelerator].memory_bytes if accelerator else None
    told["advice"] = advice(basis, rates, there)
    return told


_UNKNOWN = "nothing: give --bench FILE, --measure or --accelerator NAME"


def pace_of(basis: Basis, rates: Rates) -> dict[str, Any]:
    """Rows per second of each part, what limits the run, and its time; empty if not known."""
    run = basis.run
    row = row_bytes(run.activations.dtype, basis.model.widths)
    site_row = row * len(run.sites) / len(basis.model.widths)
    sharing = max(1, run.processes.trainers // (run.activations.streams or 1))
    of_part = {
        "producers": _times(rates.producer_rows_per_second, run.processes.producers),
        "store_writes": _times(rates.write_bytes_per_second, 1 / row),
        "store_reads": _times(rates.read_bytes_per_second, 1 / (site_row * sharing)),
        "trainers": _times(rates.step_seconds and 1 / rates.step_seconds, run.train.batch_rows),
    }
    told: dict[str, Any] = {
        f"{part}_rows_per_second": rate for part, rate in of_part.items() if rate is not None
    }
    if rates.step_seconds:
        told["step_seconds"] = rates.step_seconds
    reading = {k: v for k, v in of_part.items() if v and k in ("store_reads", "trainers")}
    made = {k: v for k, v in of_part.items() if v and k not in reading}
    if rates.step_seconds is None or not made:
        return told
    limit = min(made | reading, key=lambda part: (made | reading)[part])
    making, using = min(made.values()), min(reading.values())
    rows = run.steps * run.train.batch_rows
    first = sum(basis.unit_rows[: _first_units(basis)])
    once = min(rows, basis.pass_rows)
    told |= {
        "limited_by": limit,
        "producers_wanted": math.ceil(using / (making / run.processes.producers)),
        "first_batch_seconds": first / making,
        "training_seconds": once / min(making, using) + (rows - once) / using,
        "producing_seconds": basis.stored_rows / making,
    }
    told["total_seconds"] = told["first_batch_seconds"] + told["training_seconds"]
    ahead = max(0.0, 1 - using / making) * len(basis.unit_rows)
    told["lead_units"] = max(_first_units(basis), round(ahead))
    return told


def pods_of(basis: Basis) -> dict[str, int]:
    """Pods of a run by role, on Kubernetes; each has its ranks' GPUs, if any."""
    run = basis.run
    return {
        "producer": run.processes.producers,
        "trainer": run.processes.trainers // run.cluster.trainer.ranks,
        "index": run.index.workers,
    }


def _first_units(basis: Basis) -> int:
    activations = basis.run.activations
    return min(len(basis.unit_rows), (activations.streams or 1) * activations.window_units)


def _times(rate: float | None, factor: float) -> float | None:
    return None if rate is None else rate * factor


def _with_sum(parts: dict[str, dict[str, int]]) -> dict[str, int]:
    """Names with their place; the sum of each place is last."""
    told: dict[str, int] = {}
    for place, of in parts.items():
        told |= {f"{place}_{name}_bytes": size for name, size in of.items() if size}
        told[f"{place}_all_bytes"] = sum(of.values())
    return told


def _cost(basis: Basis, prices: Prices, told: dict[str, Any]) -> dict[str, Any]:
    hours = told["pace"]["total_seconds"] / 3600
    pods, stored_now = told["pods"], told["stored"]
    producing = min(hours, told["pace"]["producing_seconds"] / 3600)
    of_role = {
        "producer": pods["producer"]
        * (producing if not basis.run.store.max_ahead_units else hours),
        "trainer": pods["trainer"] * hours,
    }
    over_time = list(told["set_over_time"].values())
    held = sum(over_time) / len(over_time) + stored_now["checkpoints_bytes"]
    asked = told["requests"]
    puts = sum(n for name, n in asked.items() if name.endswith(("_put", "_list")))
    gets = sum(n for name, n in asked.items() if name.endswith("_get"))
    return cost_of(prices, of_role, held / 1e9 * hours, puts, gets)
