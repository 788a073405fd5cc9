"""Runner for sae-lens: `SAETrainer.fit` with an iterator of activations as its data provider."""

import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from sae_lens import LoggingConfig, TopKTrainingSAE, TopKTrainingSAEConfig  # type: ignore[import-not-found]
from sae_lens.config import SAETrainerConfig  # type: ignore[import-not-found]
from sae_lens.training.sae_trainer import SAETrainer  # type: ignore[import-not-found]

if TYPE_CHECKING:
    from dist_sae.bench.peers import protocol
else:
    import protocol

_NOTES = [
    "Adam's eps is set in its parameter groups, because no setting controls it",
    "b_dec starts at zero; decoder rows start with unit norm (its default of .1 fits worse)",
    "decoder rows are not kept at unit norm; activations are rescaled by their norm instead",
    "the loss is not divided by the variance; clipping (norm 1) is fixed and applies to that loss",
    "AuxK: d_in / 2 latents, not divided by the error's variance",
]
_SHIPPED_NOTES = ["Adam at lr 3e-4 for any width; rows in their original scale"]


def train(spec: protocol.Spec, batches: protocol.Batches) -> protocol.Trained:
    """Train a dictionary with the spec's settings."""
    sae: dict[str, Any] = {"d_in": spec.d_in, "d_sae": spec.n_latents, "k": spec.k}
    training: dict[str, Any] = {
        "total_training_samples": spec.steps * spec.batch,
        "train_batch_size_samples": spec.batch,
        "lr_end": spec.lr,  # required, but unused: the schedule is constant
        "autocast": spec.bf16,
        "logger": LoggingConfig(log_to_wandb=False),
    }
    if spec.matched:
        sae |= {"decoder_init_norm": 1.0, "aux_loss_coefficient": protocol.AUXK_COEFFICIENT}
        training |= {
            "lr": spec.lr,
            "adam_beta1": protocol.BETAS[0],
            "adam_beta2": protocol.BETAS[1],
            "dead_feature_window": protocol.DEAD_AFTER_ROWS // spec.batch,
        }
    trainer = SAETrainer(
        SAETrainerConfig(**training),
        TopKTrainingSAE(TopKTrainingSAEConfig(**sae)),
        data_provider=batches,
    )
    if spec.matched:
        for group in trainer.optimizer.param_groups:
            group["eps"] = protocol.EPS
    fitted = trainer.fit()
    notes = _NOTES if spec.matched else _SHIPPED_NOTES
    return lambda x: fitted.decode(fitted.encode(x)), notes


if __name__ == "__main__":
    sys.exit(protocol.measure(version("sae-lens"), train))
