"""`dist-sae train --find-lr`: short runs with several learning rates, trained on one stream."""

import math
from collections.abc import Sequence
from typing import Any

from dist_sae.config import Run, jobs_of, sections_of, validate_run
from dist_sae.storage import open_store
from dist_sae.telemetry.history import read_history

_FACTORS = tuple(2.0**power for power in range(-4, 5))
_RECORDS = 20  # points of each curve
_WARMUP_SHARE = 0.1  # maximum share of the steps
_ADVICE = "train.lr is unchanged; set it in the run file"


def lr_sweep(run: Run, steps: int) -> Run:
    """Build the sweep over learning rates from 1/16 to 16 times the run's.

    Each job has its own folder under `store.runs`, named `NAME-find-lr-lrRATE`. Jobs use the run's
    schedule, shortened to `steps` steps, with a warm-up of at most a tenth of them.

    Raises:
        ConfigError: A run of only `steps` steps contradicts another setting.
    """
    train = run.train
    rates = [float(f"{run.lr * factor:.3g}") for factor in _FACTORS]
    sections = sections_of(run)
    sections["name"] = f"{run.name}-find-lr"
    sections["sae"]["dead_after_rows"] = None  # derived from the number of rows
    sections["train"] |= {
        "rows": steps * train.batch_rows,
        "warmup_steps": min(train.warmup_steps, int(_WARMUP_SHARE * steps)),
        "log_every_steps": max(1, steps // _RECORDS),
        "save_every_steps": steps,
        "keep_checkpoints": 1,
        "keep_every_steps": None,
        "keep_best": 0,
    }
    sections["sweep"] = {"over": {"train.lr": rates}}
    return validate_run(sections, "--find-lr")


def lr_table(sweep: Run, own: float) -> dict[str, Any]:
    """Return the rates that `lr_sweep` tried, and which one ended with the lowest loss.

    Args:
        sweep: The sweep, after training.
        own: Learning rate of the run itself.

    Returns:
        `own`; `rates`, with each rate's `lr`, its final `loss`, `fvu`, `l0` and `dead_share`, and
        its `curve`: the FVU after a quarter, half, three quarters and all of the steps. Numbers of
        a rate that diverged are None from then on. `best` is the rate with the lowest loss, `said`
        summarizes the result for the user, and `compare` is the command that plots the runs.
    """
    runs = open_store(sweep.store.runs, sweep.store.s3)
    rates = [_rate(job, read_history(runs, job.name)) for job in jobs_of(sweep)]
    ended = [rate for rate in rates if rate["loss"] is not None]
    best = min(ended, key=lambda rate: float(rate["loss"]), default=None)
    said = "all rates diverged" if best is None else f"lowest loss at {best['lr']:g}"
    if best is not None and best in (rates[0], rates[-1]):
        said += ", at the edge of the range; the optimum may lie outside"
    return {
        "own": own,
        "rates": rates,
        "best": best and best["lr"],
        "said": f"{said}; {_ADVICE}",
        "compare": f"dist-sae compare {sweep.store.runs}/{sweep.name} --html FILE",
    }


def _rate(job: Run, history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    reports = [record for record in history if "loss" in record]
    last = reports[-1] if reports and reports[-1]["step"] == job.steps else {}
    at = [next((r["fvu"] for r in reports if r["step"] >= s), None) for s in _quarters(job)]
    numbers = {"loss": "loss", "fvu": "fvu", "l0": "l0_latents", "dead_share": "dead_share"}
    return {
        "lr": job.lr,
        **{name: last.get(key) for name, key in numbers.items()},
        "curve": at,
    }


def _quarters(job: Run) -> list[int]:
    return [math.ceil(job.steps * quarter / 4) for quarter in (1, 2, 3, 4)]
