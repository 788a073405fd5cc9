"""FVU on held-out rows, measured during training."""

from contextlib import nullcontext

import torch
from torch import Tensor

from dist_sae.checkpoint.state import TrainingState
from dist_sae.config import Run
from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.normaliser import Normaliser
from dist_sae.distributed.mesh import Mesh


class HeldoutFvu:
    """The first `train.heldout_rows` held-out rows, split among the ranks and kept in memory."""

    def __init__(
        self, run: Run, mesh: Mesh, activation_set: ActivationSet, normaliser: Normaliser
    ) -> None:
        self._rows = run.train.heldout_rows // mesh.world
        self._mesh = mesh
        self._activation_set = activation_set
        self._normaliser = normaliser
        self._x: Tensor | None = None

    @torch.no_grad()
    def measure(self, state: TrainingState) -> float | None:
        """FVU of the weights that an evaluation would take. Collective.

        Returns:
            None if `train.heldout_rows` is 0, or while held-out units are missing.
        """
        if not self._rows:
            return None
        if self._x is None and not self._read():
            return None
        assert self._x is not None
        centred = self._x - self._normaliser.mean.to(self._x)
        with state.average.applied() if state.average else nullcontext():
            error = self._x - state.sae.infer(self._x).x_hat
        sums = torch.stack([error.square().sum(), centred.square().sum()])
        missed, total = state.sae.axis.total(sums).tolist()
        return float(missed / total)

    def _read(self) -> bool:
        """Read this rank's rows; False if a unit does not exist yet."""
        numbers, mesh = self._activation_set.plan.heldout_units, self._mesh
        if mesh.any_rank(not self._activation_set.exist(numbers)):
            return False
        rows = torch.cat(list(self._activation_set.heldout_rows(mesh.world * self._rows)))
        own = rows[mesh.rank * len(rows) // mesh.world :][: len(rows) // mesh.world]
        self._x = own.to(mesh.device) * self._normaliser.scale
        return True
