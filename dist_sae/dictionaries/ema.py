"""A running mean of the weights, evaluated instead of the last weights (Gao et al. 2024, A.3).

    mean <- mean + (1 - d) (weights - mean)          d = min(decay, n / (n + 9)) after n updates

If the run is short relative to the decay, the mean covers the last tenth of the steps, so it never
includes the initial weights. The recipe's constraints are applied to the mean as well.

BatchTopK's threshold is not averaged. Averaged rows are shorter along directions that vary, so
fewer codes would exceed a threshold that belongs to the last weights. Instead, the threshold is
measured on the same rows with the mean and with the last weights, and the known threshold is
multiplied by their ratio.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.interface import Rows
from dist_sae.dictionaries.schedules import GROWTH


class WeightAverage:
    """Exponential moving average of a dictionary's parameters and buffers, in their precision.

    Args:
        sae: The dictionary. The mean starts at its current weights.
        decay: Largest decay per update.
    """

    mean: dict[str, Tensor]
    updates: int
    """Number of updates that the mean includes."""

    def __init__(self, sae: Dictionary, decay: float) -> None:
        self._sae = sae
        self._decay = decay
        self._last: tuple[Rows, float] | None = None
        self.mean = {name: tensor.detach().clone() for name, tensor in self._sae.tensors()}
        self.updates = 0

    @torch.no_grad()
    def update(self, rows: Rows, progress: float) -> None:
        """Update the mean with the current parameters after a step.

        Args:
            rows: This rank's rows of the step.
            progress: See `StepContext`.
        """
        decay = min(self._decay, self.updates / (self.updates + GROWTH))
        for name, tensor in self._sae.tensors():
            if name not in self._sae.selection.measured:
                self.mean[name].lerp_(tensor, 1 - decay)
        self._swap()
        self._sae.constrain()
        self._swap()
        self.updates += 1
        self._last = rows, progress

    @torch.no_grad()
    def measure(self) -> None:
        """Measure the buffers that are not averaged, on the rows of the last step. Collective.

        Each buffer is measured with the mean and with the last weights. For the last weights its
        value is also known from many batches, and is multiplied by the ratio of the two
        measurements. That ratio depends little on the rows.
        """
        sae, last, self._last = self._sae, self._last, None
        if last is None or not sae.selection.measured:
            return
        known = {name: sae.get_buffer(name).clone() for name in sae.selection.measured}
        sae.measure(*last)
        here = {name: sae.get_buffer(name).clone() for name in sae.selection.measured}
        self._swap()
        sae.measure(*last)
        self._swap()
        for name in sae.selection.measured:
            quotient = known[name] / here[name]
            self.mean[name].mul_(torch.where(quotient.isfinite(), quotient, 1.0))
            sae.get_buffer(name).copy_(known[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Swap the mean into the dictionary for the duration of a `with` block. Collective."""
        self.measure()
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, tensor in self._sae.tensors():  # swaps the memory without copying
            tensor.data, self.mean[name] = self.mean[name], tensor.data
