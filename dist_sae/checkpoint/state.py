"""What of a training run is saved, and how it is put back."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dist_sae.checkpoint.layout import Checkpoint
from dist_sae.sae.dead import DeadLatents

_MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHTS = ("W_enc", "W_dec", "b_enc", "b_dec")
"""What of a checkpoint makes the dictionary."""
IDLE_ROWS = "idle_rows"
"""Rows since each latent last fired."""


class TrainingTensors(NamedTuple):
    """The live objects whose state a checkpoint holds."""

    sae: nn.Module
    optimizer: torch.optim.Adam
    dead: DeadLatents

    def collect(self) -> dict[str, Tensor]:
        """Every tensor that the run cannot do without, by name."""
        tensors: dict[str, Tensor] = {IDLE_ROWS: self.dead.idle_rows}
        for name, parameter in self.sae.named_parameters():
            tensors[name] = parameter
            state = self.optimizer.state[parameter]
            for moment in _MOMENTS:
                tensors[f"{moment}.{name}"] = state[moment]
        return tensors

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Put the tensors back where `collect` took them from."""
        tensors = checkpoint.tensors
        self.dead.idle_rows = tensors[IDLE_ROWS].to(self.dead.idle_rows.device)
        for name, parameter in self.sae.named_parameters():
            parameter.copy_(tensors[name])
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(checkpoint.step), device=parameter.device),
                **{m: tensors[f"{m}.{name}"].to(parameter.device) for m in _MOMENTS},
            }


def weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The dictionary's parameters, as a state dict."""
    return {name: checkpoint.tensors[name] for name in WEIGHTS}
