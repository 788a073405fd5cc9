"""Trained dictionaries, for programs that evaluate, export or show them."""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dist_sae.checkpoint.layout import Checkpoint, Checkpoints
from dist_sae.checkpoint.state import IDLE_ROWS, load_weights
from dist_sae.config import Run
from dist_sae.config.fingerprint import check_same_run
from dist_sae.dictionaries import build_sae
from dist_sae.dictionaries.base import Dictionary
from dist_sae.errors import (
    ConfigError,
    CorruptObjectError,
    ObjectNotFoundError,
    PlanMismatchError,
)
from dist_sae.storage import ObjectStore

logger = logging.getLogger(__name__)


class Trained(NamedTuple):
    """A whole dictionary, after some steps."""

    run: Run
    """As it was trained, from the checkpoint; its stores are those of the run file at hand."""
    checkpoint: Checkpoint
    sae: Dictionary
    scale: float
    """Activations are multiplied by it."""
    mean: Float[Tensor, " d_in"]
    """Of the scaled activations."""
    idle_rows: Int[Tensor, " n_latents"]
    """Rows since each latent last fired."""

    suffix: str
    """See `suffix`."""

    @property
    def step(self) -> int:
        """Steps done."""
        return self.checkpoint.step

    def check_plan(self, plan: str) -> None:
        """Make sure that the activation set at hand is the one that the run was trained on.

        Args:
            plan: Hash of its plan.

        Raises:
            PlanMismatchError: It is another.
        """
        store = self.run.store
        if self.checkpoint.scalars["plan"] != plan:
            raise PlanMismatchError(
                f"{store.runs}/{self.run.name}: was trained on another activation set than "
                f"{store.activations}; restore store.activations"
            )


def read_trained(runs: ObjectStore, run: Run, step: int | None = None) -> Trained | None:
    """A checkpoint, or the newest that can be read; None if the run has none yet.

    Of the newest, a damaged one is reported as an error and the one before is taken. A trainer that
    goes on meanwhile may delete the one that is being read, and has then made a newer one.

    Args:
        runs: The store of runs.
        run: As the run file at hand says.
        step: Of the checkpoint; None takes the newest.

    Raises:
        ConfigError: There is no checkpoint of that step.
        PlanMismatchError: The run was trained with other settings.
        CorruptObjectError, ObjectNotFoundError: There are some, and all are damaged.
    """
    checkpoints = Checkpoints(runs, run.name, run.train.keep_checkpoints)
    if step is not None:
        checkpoint = chosen(checkpoints, step, f"{runs.url}/{run.name}")
        return _read(run, checkpoint, suffix(runs, run, step))
    tried: dict[int, CorruptObjectError | ObjectNotFoundError] = {}
    while left := [step for step in checkpoints.steps() if step not in tried]:
        try:
            return _read(run, checkpoints.open(left[-1]), "")
        except (CorruptObjectError, ObjectNotFoundError) as exc:
            if left[-1] in checkpoints.steps():
                logger.error("the checkpoint of step %d is passed over: %s", left[-1], exc)
            tried[left[-1]] = exc.with_traceback(None)  # which has a dictionary
    if tried:
        raise tried[max(tried)]
    return None


def suffix(runs: ObjectStore, run: Run, step: int) -> str:
    """Suffix for names of a checkpoint's results: empty for the newest, else its step."""
    steps = Checkpoints(runs, run.name, run.train.keep_checkpoints).steps()
    return "" if step == steps[-1] else f"-step-{step:08d}"


def find_checkpoint(runs: ObjectStore, run: Run, step: int | None) -> Checkpoint | None:
    """The checkpoint that `read_trained` begins with, whose parts may be damaged.

    Raises:
        ConfigError: There is no checkpoint of that step.
        PlanMismatchError: The run was trained with other settings.
    """
    checkpoints = Checkpoints(runs, run.name, run.train.keep_checkpoints)
    if step is None:
        checkpoint = checkpoints.latest()
    else:
        checkpoint = chosen(checkpoints, step, f"{runs.url}/{run.name}")
    if checkpoint is not None:
        trained_run(checkpoint, run)
    return checkpoint


def chosen(checkpoints: Checkpoints, step: int, place: str) -> Checkpoint:
    """The checkpoint of a step.

    Raises:
        ConfigError: There is none.
        CorruptObjectError: Its manifest is damaged.
    """
    steps = checkpoints.steps()
    if step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise ConfigError(f"--step: {place} has no {step}; there are: {there}")
    return checkpoints.open(step)


def trained_run(checkpoint: Checkpoint, run: Run) -> Run:
    """The run that a checkpoint is of, which the run file at hand must mean.

    Raises:
        PlanMismatchError: It means another.
    """
    return check_own(checkpoint.scalars["run"], run)


def check_own(settings: Mapping[str, Any], run: Run) -> Run:
    """`check_same_run` for programs that only look, and so can take a folder instead."""
    place = f"{run.store.runs}/{run.name}"
    remedy = f"give the settings it was trained with, or its folder, {place}, as the run file"
    return check_same_run(settings, run, place, remedy)


def _read(run: Run, checkpoint: Checkpoint, name_suffix: str) -> Trained:
    own = trained_run(checkpoint, run)
    mean = torch.tensor(checkpoint.scalars["mean"])
    sae = build_sae(own.sae, len(mean))
    load_weights(sae, checkpoint)
    scale = float(checkpoint.scalars["scale"])
    return Trained(own, checkpoint, sae, scale, mean, checkpoint.read(IDLE_ROWS), name_suffix)
