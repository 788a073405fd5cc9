"""Runner for eai-sparsify: its `Trainer`, with a stand-in for the language model.

The trainer takes activations from a hook on a module of the model. The stand-in has one module,
whose inputs and outputs are the next batch. Row numbers stand in for tokens.
"""

import os
import sys
import tempfile
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # read at import; Triton kernels cannot run on a CPU

from sparsify import SparseCoderConfig, TrainConfig, Trainer  # type: ignore[import-not-found]

if TYPE_CHECKING:
    from dist_sae.bench.peers import protocol
else:
    import protocol

_NOTES = [
    "Adam's eps is set directly and the lr schedule is removed, because no setting does so",
    "gradients are not clipped",
    "AuxK gives no gradient to the encoder; d_in / 2 latents, divided by the variance of x",
]
_SHIPPED_NOTES = ["schedule-free signum instead of Adam; no AuxK; rows in their original scale"]
_BF16_NOTES = [
    "its autocast supports only CUDA: forward() is wrapped in the same autocast for the CPU",
]


class Site(nn.Module):
    """Hooked module that returns the given outputs."""

    def forward(self, _inputs: Tensor, outputs: Tensor) -> Tensor:
        return outputs


class Rows(nn.Module):
    """Stand-in for the language model, which passes the next batch through its one module."""

    def __init__(self, spec: protocol.Spec, batches: protocol.Batches) -> None:
        super().__init__()
        self.site = Site()
        self.device = torch.device("cpu")
        self.dummy_inputs = {"input_ids": torch.zeros(1, 0, dtype=torch.long)}
        self._spec = spec
        self._batches = batches

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        asked = bool(input_ids.numel())  # without row numbers, only the width is wanted
        rows = next(self._batches) if asked else torch.zeros(0, self._spec.d_in)
        outputs: Tensor = self.site(*(part[None] for part in self._spec.split(rows)))
        return outputs


class RowNumbers(Dataset[dict[str, Tensor]]):
    """Data set whose item i is the row numbers of batch i."""

    def __init__(self, spec: protocol.Spec) -> None:
        self._spec = spec

    def __len__(self) -> int:
        return self._spec.steps

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        first = number * self._spec.batch
        return {"input_ids": torch.arange(first, first + self._spec.batch)}


class UnsavedTrainer(Trainer):  # type: ignore[misc]
    """Trainer that saves no checkpoints, because saving would add to a step's time."""

    def save(self) -> None:
        """Do nothing."""


def train(spec: protocol.Spec, batches: protocol.Batches) -> protocol.Trained:
    """Train a dictionary with the spec's settings."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = _build(spec, batches, folder)
        trainer.fit()
        batches.finish()  # before the folder is deleted
    for optimizer in trainer.optimizers:
        if hasattr(optimizer, "eval"):  # schedule-free: switch to the weights that would be saved
            optimizer.eval()
    sae = trainer.saes["site"]

    def reconstruct(x: Tensor) -> Tensor:
        codes = sae.encode(x)
        x_hat: Tensor = sae.decode(codes.top_acts, codes.top_indices)
        return x_hat

    notes = (_NOTES if spec.matched else _SHIPPED_NOTES) + (_BF16_NOTES if spec.bf16 else [])
    return reconstruct, notes


def _build(spec: protocol.Spec, batches: protocol.Batches, folder: str) -> Any:
    settings: dict[str, Any] = {
        "sae": SparseCoderConfig(num_latents=spec.n_latents, k=spec.k, transcode=spec.transcoder),
        "batch_size": 1,  # sequences, each of which is a whole batch of rows
        "hookpoints": ["site"],
        "init_seeds": [spec.seed],
        "log_to_wandb": False,
        "save_dir": folder,
    }
    if spec.matched:
        settings |= {
            "optimizer": "adam",
            "lr": spec.lr,
            "lr_warmup_steps": 0,
            "auxk_alpha": protocol.AUXK_COEFFICIENT,
            "dead_feature_threshold": protocol.DEAD_AFTER_ROWS,
        }
    trainer = UnsavedTrainer(TrainConfig(**settings), RowNumbers(spec), Rows(spec, batches))
    if spec.matched:
        trainer.lr_schedulers = []
        for group in trainer.optimizers[0].param_groups:
            group["eps"] = protocol.EPS
    if spec.bf16:
        sae = trainer.saes["site"]
        sae.forward = torch.autocast("cpu", dtype=torch.bfloat16)(sae.forward)
    return trainer


if __name__ == "__main__":
    sys.exit(protocol.measure(version("eai-sparsify"), train))
