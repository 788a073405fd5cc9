"""A running mean of the weights, to evaluate instead of the last ones (Gao et al. 2024, A.3)."""

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average of a module's parameters, in their precision.

    Args:
        module: Whose parameters; the mean begins at what they are now.
        decay: Of the mean, per update.
    """

    mean: dict[str, Tensor]

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module = module
        self._decay = decay
        self.mean = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        for name, parameter in self._module.named_parameters():
            self.mean[name].lerp_(parameter, 1 - self._decay)
