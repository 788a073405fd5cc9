"""A run's forecast as one table. `dist-sae estimate` prints it."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from dist_sae.planning import memory, stored, traffic
from dist_sae.planning.advice import advice
from dist_sae.planning.cost import Prices, compute_cost
from dist_sae.planning.rates import ACCELERATORS, Rates
from dist_sae.planning.risk import compute_risk
from dist_sae.planning.sizes import RunSizes, sites_of

_UNKNOWN = "unknown; pass --bench FILE, --measure or --accelerator NAME"


def estimate(
    groups: Sequence[Sequence[RunSizes]],
    rates: Rates,
    *,
    program_bytes: int,
    trainer_bytes: int,
    accelerator: str | None = None,
    prices: Prices | None = None,
) -> dict[str, Any]:
    """Forecast a run, or a sweep.

    Args:
        groups: The run; or the jobs of a sweep, grouped by shared ranks and batches.
        rates: Speeds of single processes. The step time is that of the slowest group.
        program_bytes: Host memory of a program with its libraries.
        trainer_bytes: Host memory of a trainer, which has more libraries.
        accelerator: Key of `ACCELERATORS`, or None for CPUs.
        prices: Prices for the cost; None leaves it out.

    Returns:
        Named sections of numbers. The names of the numbers contain the units.
    """
    jobs, gpu = list(chain.from_iterable(groups)), accelerator is not None
    of_groups = [memory.trainer_memory(group, trainer_bytes, gpu=gpu) for group in groups]
    longest = max(jobs, key=lambda job: job.run.steps)
    run, pace = longest.run, compute_pace(groups, rates)
    requests = [stored.requests(group, pace.get("total_seconds", 0.0)) for group in groups]
    requests_by = {"producers": Counter(requests[0]["producers"]), "trainers": Counter[str]()}
    for each in requests:
        requests_by["trainers"].update(each["trainers"])
    sent = max((_sent(group) for group in groups), key=lambda each: sum(each.values()))
    at_times = stored.stored_over_time(longest, pace.get("lead_units"))
    of_checkpoints = [memory.checkpoint_bytes(job) for job in jobs]
    forecast: dict[str, Any] = {
        "rows": {
            "known_from": longest.source,
            "train_rows": sum(longest.unit_rows),
            "heldout_rows": sum(longest.heldout_unit_rows),
            "trained_rows": run.steps * run.train.batch_rows,
            "steps": run.steps,
            "passes": run.rows / longest.pass_rows,
            "units": len(longest.units),
            "unit_rows": max(longest.unit_rows),
            "streams": longest.streams,
        },
        "memory_of_a_trainer": max(map(_with_sums, of_groups), key=_all),
        "memory_of_a_producer": _with_sums(memory.producer_memory(longest, program_bytes, gpu=gpu)),
    }
    if run.index.workers:
        of_jobs = [_with_sums(memory.index_memory(job, program_bytes, gpu=gpu)) for job in jobs]
        forecast["memory_of_an_index_worker"] = max(of_jobs, key=_all)
    forecast |= {
        "stored": {
            "row_bytes": longest.row_bytes(),
            "set_bytes": stored.set_bytes(longest),
            "read_before_the_first_step_bytes": sum(map(stored.first_step_bytes, groups)),
            "checkpoint_bytes": sum(of_checkpoints),
            "checkpoints_bytes": sum(
                size * stored.checkpoints_kept(job)
                for size, job in zip(of_checkpoints, jobs, strict=True)
            ),
            "index_bytes": sum(map(stored.index_bytes, jobs)) if run.index.workers else 0,
        },
        "set_over_time": {f"{name}_bytes": size for name, size in at_times.items()},
        "requests": {
            f"{who}_{kind}": n for who, of in requests_by.items() for kind, n in of.items()
        },
        "network_of_a_rank_and_step": {f"{name}_bytes": size for name, size in sent.items()},
        "pace": pace | {"rates_from": "; ".join(rates.sources) or _UNKNOWN},
        "pods": {
            "producer": run.processes.producers,
            "trainer": sum(group[0].run.processes.trainers for group in groups)
            // run.cluster.trainer.ranks,
            "index": run.index.workers,
        },
    }
    if prices and "total_seconds" in pace:
        forecast["cost"] = compute_cost(
            prices, forecast, held_back=run.store.max_ahead_units is not None
        )
    for job in jobs:
        forecast["risk" if len(jobs) == 1 else f"risk_of_{job.run.name}"] = compute_risk(job)
    device_bytes = ACCELERATORS[accelerator].memory_bytes if accelerator else None
    forecast["advice"] = advice(groups[0], rates, device_bytes)
    return forecast


def compute_pace(groups: Sequence[Sequence[RunSizes]], rates: Rates) -> dict[str, Any]:
    """Compute each part's rows per second, what limits the run, and the run's time.

    Figures that the known rates do not determine are left out.
    """
    sizes = max(chain.from_iterable(groups), key=lambda job: job.run.steps)
    run = sizes.run
    bytes_read = sum(sizes.row_bytes(sites_of(group)) for group in groups)
    of_part = {
        "producers": _times(rates.producer_rows_per_second, run.processes.producers),
        "store_writes": _times(rates.write_bytes_per_second, 1 / sizes.row_bytes()),
        "store_reads": _times(rates.read_bytes_per_second, 1 / (bytes_read * sizes.sharing)),
        "trainers": _times(rates.step_seconds and 1 / rates.step_seconds, run.train.batch_rows),
    }
    known = {part: rate for part, rate in of_part.items() if rate}
    pace: dict[str, Any] = {f"{part}_rows_per_second": rate for part, rate in known.items()}
    if rates.step_seconds:
        pace["step_seconds"] = rates.step_seconds
    made = [known[part] for part in ("producers", "store_writes") if part in known]
    if rates.step_seconds is None or not made:
        return pace
    making = min(made)
    using = min(known[part] for part in ("store_reads", "trainers") if part in known)
    rows = run.steps * run.train.batch_rows
    once = min(rows, sizes.pass_rows)
    made_in = sum(sizes.unit_rows[: sizes.first_windows]) / making
    first_batch = (rates.producer_begin_seconds or 0.0) + made_in
    begin = rates.trainer_begin_seconds or 0.0
    training = once / min(making, using) + (rows - once) / using
    if begin:
        pace["begin_and_end_seconds"] = begin
    ahead = max(0.0, 1 - using / making) * len(sizes.unit_rows)
    return pace | {
        "limited_by": min(known, key=lambda part: known[part]),
        "producers_wanted": math.ceil(using / (making / run.processes.producers)),
        "first_batch_seconds": first_batch,
        "training_seconds": training,
        "producing_seconds": (rates.producer_begin_seconds or 0.0) + sum(sizes.units) / making,
        "total_seconds": first_batch + begin + training,
        "lead_units": max(sizes.first_windows, round(ahead)),
    }


def _times(rate: float | None, factor: float) -> float | None:
    return None if rate is None else rate * factor


def _sent(jobs: Sequence[RunSizes]) -> Counter[str]:
    """Return the bytes that a rank sends in a step, by collective, summed over jobs."""
    sent = Counter[str]()
    for job in jobs:
        sent.update(traffic.step_traffic(job))
        sent["auxk_while_latents_are_dead"] += traffic.auxk_traffic(job)
    return sent


def _all(parts: Mapping[str, int]) -> int:
    return sum(parts.values())


def _with_sums(parts: dict[str, dict[str, int]]) -> dict[str, int]:
    """Flatten `{place: {name: bytes}}` to one level, with the sum of each place after its parts."""
    flat: dict[str, int] = {}
    for place, of in parts.items():
        flat |= {f"{place}_{name}_bytes": size for name, size in of.items() if size}
        flat[f"{place}_all_bytes"] = sum(of.values())
    return flat
