"""Runner for dictionary-learning: `trainSAE`, with `TopKTrainer`, over an iterator of batches."""

import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from dictionary_learning.trainers.top_k import TopKTrainer  # type: ignore[import-not-found]
from dictionary_learning.training import trainSAE  # type: ignore[import-not-found]
from torch import Tensor

if TYPE_CHECKING:
    from dist_sae.bench.peers import protocol
else:
    import protocol

_WARMUP_STEPS = 1000  # dictionary-learning's default

_NOTES = [
    "Adam's eps is set in its parameter groups, because no setting controls it",
    "the loss is not divided by the variance; clipping (norm 1) is fixed and applies to that loss",
    "AuxK: d_in / 2 latents",
]
_SHIPPED_NOTES = [
    f"lr warms up over {_WARMUP_STEPS} steps, its default, however short the run",
    "rows in their original scale",
]
_BF16_NOTES = [
    "trainSAE skips autocast on a CPU: update() is wrapped in the autocast it uses on a GPU",
]


class Bf16TopKTrainer(TopKTrainer):  # type: ignore[misc]
    """Trainer whose updates run under autocast, as trainSAE runs them on a GPU."""

    def update(self, step: int, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().update(step, x)


def train(spec: protocol.Spec, batches: protocol.Batches) -> protocol.Trained:
    """Train a dictionary with the spec's settings."""
    trainers: list[Any] = []  # trainSAE returns nothing

    def build(**settings: Any) -> Any:
        trainers.append(_build(spec, settings))
        return trainers[-1]

    trainSAE(
        batches,
        [{"trainer": build}],
        steps=spec.steps,
        device="cpu",
        autocast_dtype=torch.bfloat16 if spec.bf16 else torch.float32,
    )
    ae = trainers[0].ae
    notes = (_NOTES if spec.matched else _SHIPPED_NOTES) + (_BF16_NOTES if spec.bf16 else [])
    return lambda x: ae.decode(ae.encode(x)), notes


def _build(spec: protocol.Spec, settings: dict[str, Any]) -> Any:
    trainer_class = Bf16TopKTrainer if spec.bf16 else TopKTrainer
    settings |= {
        "activation_dim": spec.d_in,
        "dict_size": spec.n_latents,
        "k": spec.k,
        "layer": 0,
        "lm_name": "rows",
        "seed": spec.seed,
        "device": "cpu",
        "steps": max(spec.steps, _WARMUP_STEPS + 1),  # runs shorter than the warm-up fail
    }
    if not spec.matched:
        return trainer_class(**settings)
    settings |= {
        "lr": spec.lr,
        "warmup_steps": 0,
        "auxk_alpha": protocol.AUXK_COEFFICIENT,
    }
    trainer = trainer_class(**settings)
    trainer.dead_feature_threshold = protocol.DEAD_AFTER_ROWS
    for group in trainer.optimizer.param_groups:
        group["eps"] = protocol.EPS
    return trainer


if __name__ == "__main__":
    sys.exit(protocol.measure(version("dictionary-learning"), train))
