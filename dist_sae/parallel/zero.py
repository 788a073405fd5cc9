"""The DeepSpeed configuration that a run implies. Pure; imports no DeepSpeed."""

from collections.abc import Mapping
from typing import Any

from dist_sae.config import Run

_NEVER = 2**31 - 1  # steps between DeepSpeed's own reports


def deepspeed_config(run: Run) -> dict[str, Any]:
    """Derived from the run, with the user's `train.deepspeed` merged over it."""
    derived = {
        "train_micro_batch_size_per_gpu": run.train.batch_rows // run.processes.trainers,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 0},
        "steps_per_print": _NEVER,
    }
    return _merged(derived, run.train.deepspeed)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        there = result.get(key)
        if isinstance(there, Mapping) and isinstance(value, Mapping):
            result[key] = _merged(there, value)
        else:
            result[key] = value
    return result
