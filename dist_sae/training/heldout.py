"""FVU on held-out rows, measured during training."""

from contextlib import nullcontext

import torch

from dist_sae.checkpoint.state import TrainingState
from dist_sae.config import Run
from dist_sae.data.activation_set import ActivationSet
from dist_sae.device import in_tf32
from dist_sae.dictionaries.interface import Rows
from dist_sae.dictionaries.normaliser import SiteNormalisers
from dist_sae.distributed.mesh import Mesh


class HeldoutFvu:
    """Measures FVU on the first `train.heldout_rows` held-out rows.

    The rows are split among the ranks and stay in memory.
    """

    def __init__(
        self, run: Run, mesh: Mesh, activation_set: ActivationSet, normalisers: SiteNormalisers
    ) -> None:
        self._rows = run.train.heldout_rows // mesh.world
        self._mesh = mesh
        self._activation_set = activation_set
        self._normalisers = normalisers
        self._kept: Rows | None = None

    @torch.no_grad()
    def measure(self, state: TrainingState) -> float | None:
        """Compute the FVU of the weights that an evaluation would use. Collective.

        These are the running average if there is one. On a GPU, products are in TF32 for speed,
        because this runs at every save. An evaluation computes in fp32.

        Returns:
            The FVU, or None if `train.heldout_rows` is 0 or a held-out unit is missing.
        """
        if not self._rows:
            return None
        if self._kept is None and not self._read():
            return None
        assert self._kept is not None
        inputs, targets = self._kept
        centred = targets - self._normalisers.mean.to(targets)
        with state.average.applied() if state.average else nullcontext(), in_tf32(inputs.device):
            error = targets - state.sae.infer(inputs).x_hat
        sums = torch.stack([error.square().sum(), centred.square().sum()])
        missed, total = state.sae.axis.total(sums).tolist()
        return float(missed / total)

    def _read(self) -> bool:
        """Read this rank's rows. Return False if a unit does not exist yet."""
        numbers, mesh = self._activation_set.plan.heldout_units, self._mesh
        if mesh.any_rank(not self._activation_set.exist(numbers)):
            return False
        blocks = list(self._activation_set.heldout_rows(mesh.world * self._rows))
        own = {}
        for site in self._activation_set.sites:
            rows = torch.cat([block[site] for block in blocks])
            own[site] = rows[mesh.rank * len(rows) // mesh.world :][: len(rows) // mesh.world]
        self._kept = self._normalisers.rows(own, mesh.device)
        return True
