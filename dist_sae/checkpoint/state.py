"""What of a training run is saved, and how it is put back."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dist_sae.checkpoint.layout import Checkpoint
from dist_sae.sae.dead import DeadLatents

_MOMENTS = ("exp_avg", "exp_avg_sq")


class TrainingTensors(NamedTuple):
    """The live objects whose state a checkpoint holds."""

    sae: nn.Module
    optimizer: torch.optim.Adam
    dead: DeadLatents

    def collect(self) -> dict[str, Tensor]:
        """Every tensor that the run cannot do without, by name."""
        tensors: dict[str, Tensor] = {"idle_rows": self.dead.idle_rows}
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
        self.dead.idle_rows = tensors["idle_rows"].to(self.dead.idle_rows.device)
        for name, parameter in self.sae.named_parameters():
            parameter.copy_(tensors[name])
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(checkpoint.step)),
                **{m: tensors[f"{m}.{name}"].to(parameter.device) for m in _MOMENTS},
            }


def weights(checkpoint: Checkpoint) -> dict[str, Any]:
    """The dictionary's parameters alone, as a state dict."""
    names = ("W_enc", "W_dec", "b_enc", "b_dec")
    return {name: checkpoint.tensors[name] for name in names}
