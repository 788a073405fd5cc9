"""What a run has learnt so far, for those who look at it: to evaluate, export, show it."""

import logging
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dist_sae.checkpoint.layout import Checkpoint, Checkpoints
from dist_sae.checkpoint.state import IDLE_ROWS, load_weights
from dist_sae.config import Run
from dist_sae.errors import CorruptObjectError, ObjectNotFoundError
from dist_sae.sae import build_sae
from dist_sae.sae.base import Dictionary
from dist_sae.storage import ObjectStore

logger = logging.getLogger(__name__)


class Trained(NamedTuple):
    """A whole dictionary, after some steps."""

    step: int
    sae: Dictionary
    scale: float
    """Activations are multiplied by it."""
    mean: Float[Tensor, " d_in"]
    """Of the scaled activations."""
    idle_rows: Int[Tensor, " n_latents"]
    """Rows since each latent last fired."""


def read_trained(runs: ObjectStore, run: Run) -> Trained | None:
    """The newest checkpoint that can be read, None if the run has none yet.

    A damaged one is reported as an error and the one before is taken. A trainer that goes on
    meanwhile may delete the one that is being read, and has then made a newer one.

    Raises:
        CorruptObjectError, ObjectNotFoundError: There are some, and all are damaged.
    """
    checkpoints = Checkpoints(runs, run.name, run.train.keep_checkpoints)
    tried: dict[int, CorruptObjectError | ObjectNotFoundError] = {}
    while left := [step for step in checkpoints.steps() if step not in tried]:
        try:
            return _read(run, checkpoints.open(left[-1]))
        except (CorruptObjectError, ObjectNotFoundError) as exc:
            if left[-1] in checkpoints.steps():
                logger.error("the checkpoint of step %d is passed over: %s", left[-1], exc)
            tried[left[-1]] = exc.with_traceback(None)  # which has a dictionary
    if tried:
        raise tried[max(tried)]
    return None


def _read(run: Run, checkpoint: Checkpoint) -> Trained:
    mean = torch.tensor(checkpoint.scalars["mean"])
    sae = build_sae(run.sae, len(mean))
    load_weights(sae, checkpoint)
    scale = float(checkpoint.scalars["scale"])
    return Trained(checkpoint.step, sae, scale, mean, checkpoint.read(IDLE_ROWS))
