"""Saving and restoring of the state of a training run."""

import logging
from collections.abc import Callable, Container, Iterator, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dist_sae.checkpoint.layout import Checkpoint, Piece
from dist_sae.checkpoint.lineage import Lineage
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.dead import DeadLatents
from dist_sae.dictionaries.ema import WeightAverage

logger = logging.getLogger(__name__)

IDLE_ROWS = "idle_rows"
"""Name of the tensor with the rows since each latent last fired."""
_EMA = "ema."
_UPDATES = "ema_updates"


class Moments(Protocol):
    """The optimizer's part of the state; see `Engine`."""

    moments: tuple[str, ...]

    def moment(self, parameter: nn.Parameter, name: str) -> Tensor: ...

    def restore(self, step: int, moments: dict[nn.Parameter, dict[str, Tensor]]) -> None: ...


class TrainingState(NamedTuple):
    """The live objects whose state is saved in a checkpoint."""

    sae: Dictionary
    engine: Moments
    dead: DeadLatents
    average: WeightAverage | None

    def pieces(self) -> Iterator[Piece]:
        """Yield this rank's part of every tensor that is needed to resume, one at a time.

        All ranks must iterate in lockstep. The rows of a shard are divided among its replicas.
        """
        if (
            self.average
        ):  # collective, so before any write: a rank whose write fails would be missing here
            self.average.measure()
        yield self._piece(IDLE_ROWS, self.dead.idle_rows)
        for name, buffer in self.sae.named_buffers():
            yield self._piece(name, buffer)
        for name, parameter in self.sae.named_parameters():
            yield self._piece(name, parameter.detach())
            for moment in self.engine.moments:
                yield self._piece(f"{moment}.{name}", self.engine.moment(parameter, moment))
        for name, mean in self.average.mean.items() if self.average else ():
            yield self._piece(f"{_EMA}{name}", mean)

    def scalars(self) -> dict[str, int]:
        """Return the numbers to store in the manifest in addition to the step and the lineage."""
        return {_UPDATES: self.average.updates} if self.average else {}

    @torch.no_grad()
    def read(self, checkpoint: Checkpoint) -> Callable[[], None]:
        """Read this rank's part. Collective.

        Returns:
            A function that applies dead counts, running mean and optimizer state.

        Raises:
            CorruptObjectError: The checkpoint is damaged. Another one can be read instead.
        """
        idle_rows = self._read(checkpoint, IDLE_ROWS)
        for name, buffer in self.sae.named_buffers():
            self._fill(buffer, checkpoint, name)
        moments = {}
        for name, parameter in self.sae.named_parameters():
            self._fill(parameter, checkpoint, name)
            moments[parameter] = {
                m: self._read(checkpoint, f"{m}.{name}") for m in self.engine.moments
            }
        for name, mean in self.average.mean.items() if self.average else ():
            stored = f"{_EMA}{name}"  # missing if the parent has no mean, and in old checkpoints
            self._fill(mean, checkpoint, stored if checkpoint.has(stored) else name)
        updates = Lineage.from_scalars(checkpoint.scalars).updates + checkpoint.step
        has_mean = checkpoint.has(f"{_EMA}W_enc")
        # stored separately because a child's mean may be younger than Adam's state; not in older
        # checkpoints
        mean_updates = checkpoint.scalars.get(_UPDATES, updates) if has_mean else 0

        def apply() -> None:
            self.dead.set_idle_rows(idle_rows)
            if self.average:
                self.average.updates = mean_updates
            self.engine.restore(updates, moments)

        return apply

    def _piece(self, name: str, tensor: Tensor) -> Piece:
        axis, n = self.sae.axis, len(tensor)
        if not is_per_latent(self.sae, name):
            stores = axis.shard == axis.replica == 0
            return Piece(name, tensor if stores else tensor[:0], 0, n)
        start, stop = (n * replica // axis.replicas for replica in (axis.replica, axis.replica + 1))
        return Piece(name, tensor[start:stop], self.sae.first_latent + start, self.sae.n_latents)

    def _fill(self, tensor: Tensor, checkpoint: Checkpoint, name: str) -> None:
        first = self.sae.first_latent if is_per_latent(self.sae, name) else 0
        checkpoint.fill(tensor.data, name, first)

    def _read(self, checkpoint: Checkpoint, name: str) -> Tensor:
        device = self.sae.W_enc.device
        if not is_per_latent(self.sae, name):
            return checkpoint.read(name).to(device)
        first = self.sae.first_latent
        return checkpoint.read(name, first, first + len(self.sae.W_enc)).to(device)


def is_moment(name: str) -> bool:
    """Return whether a checkpoint's tensor belongs to the optimizer."""
    return name.startswith("exp_avg")


def is_weight(name: str) -> bool:
    """Return whether a checkpoint's tensor is a parameter or buffer of the dictionary.

    Running means are not counted.
    """
    return not is_moment(name) and not name.startswith(_EMA) and name != IDLE_ROWS


def is_per_latent(sae: Dictionary, name: str) -> bool:
    """Return whether dim 0 of a checkpoint's tensor is latents, and so sharded over ranks."""
    return name == IDLE_ROWS or sae.is_per_latent(name.rpartition(".")[2])


def weights_of(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the names of the tensors to use as parameters and buffers.

    These are the running means if all tensors have one. Old checkpoints have means without the
    matching threshold. Such means are useless, so the last weights are used instead.
    """
    names = {name.removeprefix(_EMA) for name in checkpoint.manifest.tensors}
    names = {name for name in names if is_weight(name)}
    means = {name: f"{_EMA}{name}" for name in names}
    if all(map(checkpoint.has, means.values())):
        return means
    lacking = sorted(name for name in names if not checkpoint.has(means[name]))
    if len(lacking) < len(names):
        logger.warning(
            "step %d: the running mean lacks %s, so the last weights are used; continue "
            "training to get both",
            checkpoint.step,
            ", ".join(lacking),
        )
    return {name: name if checkpoint.has(name) else means[name] for name in names}


@torch.no_grad()
def load_weights(
    sae: Dictionary,
    checkpoint: Checkpoint,
    stored: Mapping[str, str] | None = None,
    leave_out: Container[str] = (),
) -> None:
    """Load weights into a dictionary or a shard for inference: their running mean if available.

    A mean of unit rows may be a little shorter than 1, so the recipe's constraints are applied.

    Args:
        sae: The dictionary.
        checkpoint: The checkpoint.
        stored: Names of the dictionary's tensors in the checkpoint. From `weights_of` if None.
        leave_out: Names of tensors that are not needed.
    """
    stored = weights_of(checkpoint) if stored is None else stored
    for name, tensor in sae.tensors():
        if name not in leave_out:
            first = sae.first_latent if sae.is_per_latent(name) else 0
            checkpoint.fill(tensor, stored[name], first)
    sae.constrain()
