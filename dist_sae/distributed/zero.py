"""The DeepSpeed configuration derived from a run. Pure; does not import DeepSpeed."""

from collections.abc import Mapping
from typing import Any

from dist_sae.config import Run
from dist_sae.errors import ConfigError

_OWNED = {  # other settings decide these; DeepSpeed would train something else, or ignore the key
    "train_batch_size": "follows from train.batch_rows",
    "train_micro_batch_size_per_gpu": "follows from train.batch_rows and processes.trainers",
    "gradient_accumulation_steps": "is always 1: a batch is one step",
    "gradient_clipping": "is train.clip_norm",
    "optimizer": "is Adam with train.lr, train.betas and train.eps",
    "scheduler": "is train.warmup_steps and train.decay_share",
}
_REDUCTION = (  # how DeepSpeed averages gradients, which it only does at stages 1 and 2
    "communication_data_type",
    "fp32_allreduce",
    "gradient_predivide_factor",
    "prescale_gradients",
    "sparse_gradients",
)
_NEVER = 2**31 - 1  # steps between DeepSpeed's own reports


def deepspeed_config(run: Run) -> dict[str, Any]:
    """Derive DeepSpeed's configuration from the run, and merge `train.deepspeed` over it.

    Raises:
        ConfigError: `train.deepspeed` sets what other settings decide, or what is not supported.
    """
    zero = _section(run.train.deepspeed, "zero_optimization")
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2):
        raise ConfigError(
            f"train.deepspeed.zero_optimization.stage: {stage} would split each shard's parameters "
            f"over the replicas again; use 0, 1 or 2, and processes.latent_shards for a "
            f"dictionary that does not fit"
        )
    offload = _section(zero, "offload_optimizer", "zero_optimization.").get("device", "none")
    if offload not in ("none", "cpu"):
        raise ConfigError(
            f"train.deepspeed.zero_optimization.offload_optimizer.device: {offload} is for stage 3 "
            f"only (at stage {stage} DeepSpeed would silently use CPU memory); use cpu"
        )
    for precision in ("bf16", "bfloat16", "fp16"):
        if _section(run.train.deepspeed, precision).get("enabled"):
            raise ConfigError(
                f"train.deepspeed.{precision}: would round the parameters, which must stay fp32; "
                f"leave it out, and see train.products for the precision of products"
            )
    if not zero.get("compute_grad_norm", True):
        raise ConfigError(
            "train.deepspeed.zero_optimization.compute_grad_norm: without the norm a gradient that "
            "is not finite would reach the weights; leave it out"
        )
    if stage and not run.train.save_in_background:
        raise ConfigError(
            "train.save_in_background: false needs train.deepspeed.zero_optimization.stage 0: at "
            "other stages ranks gather what they save, and a rank that cannot write blocks the "
            "others"
        )
    owned = {key: why for key, why in _OWNED.items() if key in run.train.deepspeed}
    if not stage:
        why = "does nothing at ZeRO stage 0, where gradients are averaged without DeepSpeed"
        owned |= {key: why for key in _REDUCTION if key in run.train.deepspeed}
    if owned:
        raise ConfigError(
            "\n".join(f"train.deepspeed.{key}: {why}; leave it out" for key, why in owned.items())
        )
    derived = {
        # for DeepSpeed, a replica is one worker, because all its shards see the same batch
        "train_micro_batch_size_per_gpu": run.train.batch_rows // run.replicas,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": (run.train.clip_norm or 0.0) if stage else 0.0,
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,  # offload uses the same fused Adam
        "zero_allow_untested_optimizer": True,
        "steps_per_print": _NEVER,
        "timers": {"throughput": {"enabled": False}},  # waits for the device twice a step
    }
    return _merged(derived, run.train.deepspeed)


def _section(given: Mapping[str, Any], key: str, prefix: str = "") -> Mapping[str, Any]:
    section = given.get(key)
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise ConfigError(
            f"train.deepspeed.{prefix}{key}: must be a section with its own keys (got {section!r})"
        )
    return section


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        there = result.get(key)
        if isinstance(there, Mapping) and isinstance(value, Mapping):
            result[key] = _merged(there, value)
        else:
            result[key] = value
    return result
