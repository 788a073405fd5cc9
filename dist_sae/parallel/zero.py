"""The DeepSpeed configuration that a run implies. Pure; imports no DeepSpeed."""

from collections.abc import Mapping
from typing import Any

from dist_sae.config import Run
from dist_sae.errors import ConfigError

_OWNED = {  # what the run decides; DeepSpeed would train something else, or ignore it
    "train_batch_size": "follows from train.batch_rows",
    "train_micro_batch_size_per_gpu": "follows from train.batch_rows and processes.trainers",
    "gradient_accumulation_steps": "a batch is one step here",
    "gradient_clipping": "is train.clip_norm",
    "optimizer": "is Adam with train.lr, train.betas and train.eps",
    "scheduler": "is train.warmup_steps and train.decay_share",
}
_NEVER = 2**31 - 1  # steps between DeepSpeed's own reports


def deepspeed_config(run: Run) -> dict[str, Any]:
    """Derived from the run, with the user's `train.deepspeed` merged over it.

    Raises:
        ConfigError: The user sets what the run file decides.
    """
    owned = {key: why for key, why in _OWNED.items() if key in run.train.deepspeed}
    if owned:
        raise ConfigError(
            "\n".join(f"train.deepspeed.{key}: {why}; leave it out" for key, why in owned.items())
        )
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
