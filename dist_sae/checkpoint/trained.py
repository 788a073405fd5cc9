"""Trained dictionaries, read from checkpoints for evaluation, export or display."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from jaxtyping import Int
from torch import Tensor

from dist_sae.checkpoint.layout import Checkpoint, Checkpoints
from dist_sae.checkpoint.pages import PagedDictionary
from dist_sae.checkpoint.state import IDLE_ROWS
from dist_sae.config import Run
from dist_sae.config.fingerprint import check_same_run
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.normaliser import SiteNormalisers
from dist_sae.errors import ConfigError, CorruptObjectError, ObjectNotFoundError, PlanMismatchError
from dist_sae.storage import ObjectStore

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class Trained(NamedTuple):
    """A trained dictionary with its checkpoint and normalisers."""

    run: Run
    """The settings from the checkpoint, but with the stores of the given run file."""
    checkpoint: Checkpoint
    pages: PagedDictionary
    normalisers: SiteNormalisers
    """Scales and means of the sites that the dictionary reads and writes."""
    idle_rows: Int[Tensor, " n_latents"]
    """Number of rows since each latent last fired."""

    suffix: str
    """Suffix for the names of results; see `suffix`."""

    @property
    def step(self) -> int:
        """Number of training steps done."""
        return self.checkpoint.step

    @property
    def sae(self) -> Dictionary:
        """The whole dictionary, in memory."""
        return self.pages.whole()

    def check_plan(self, plan: str) -> None:
        """Check that the run was trained on the given activation set.

        Args:
            plan: Hash of the activation set's plan.

        Raises:
            PlanMismatchError: The run was trained on another set.
        """
        check_plan(self.run, self.checkpoint, plan)


def check_plan(run: Run, checkpoint: Checkpoint, plan: str) -> None:
    """Check that a run was trained on the activation set with this plan.

    Args:
        run: The run, with its stores.
        checkpoint: A checkpoint of the run.
        plan: Hash of the activation set's plan.

    Raises:
        PlanMismatchError: The run was trained on another set.
    """
    if checkpoint.scalars["plan"] != plan:
        raise PlanMismatchError(
            f"{run.store.runs}/{run.name}: was trained on a different activation set than "
            f"{run.store.activations}; restore store.activations"
        )


def normalisers_of(run: Run, checkpoint: Checkpoint) -> SiteNormalisers:
    """Return the normalisers that a run's checkpoint was trained with."""
    return SiteNormalisers.from_scalars(checkpoint.scalars, run.reads, run.writes)


def read_trained(runs: ObjectStore, run: Run, step: int | None = None) -> Trained | None:
    """Read a whole dictionary, by default from the newest readable checkpoint.

    None if there is no checkpoint yet. For arguments and errors see `use_checkpoint`.
    """
    return use_trained(runs, run, step, lambda trained: trained)


def use_trained(
    runs: ObjectStore,
    run: Run,
    step: int | None,
    use: Callable[[Trained], Result],
    **place: Any,
) -> Result | None:
    """Call `use` with a dictionary that may read from its checkpoint until `use` returns.

    For arguments and errors see `use_checkpoint`. `place` is passed to `PagedDictionary`.
    """

    def read(checkpoint: Checkpoint) -> Result:
        own = trained_run(checkpoint, run)
        normalisers = normalisers_of(own, checkpoint)
        pages = PagedDictionary(own.sae, normalisers.widths, checkpoint, **place)
        idle_rows = checkpoint.read(IDLE_ROWS)
        name_suffix = "" if step is None else suffix(runs, run, step)
        return use(Trained(own, checkpoint, pages, normalisers, idle_rows, name_suffix))

    return use_checkpoint(runs, run, step, read)


def use_checkpoint(
    runs: ObjectStore, run: Run, step: int | None, use: Callable[[Checkpoint], Result]
) -> Result | None:
    """Call `use` with a checkpoint, by default the newest readable one.

    Without a `step`, a damaged checkpoint is logged as an error, and the one before it is used. If
    a running trainer deletes the checkpoint while it is being read, a newer one is used.

    Args:
        runs: The store of runs.
        run: The given run.
        step: Step of the checkpoint. The newest if None.
        use: Function that reads the checkpoint. It is called again with another checkpoint if this
            one cannot be read.

    Returns:
        The result of `use`, or None if there is no checkpoint yet.

    Raises:
        ConfigError: There is no checkpoint of that step.
        PlanMismatchError: The run was trained with other settings.
        CorruptObjectError, ObjectNotFoundError: All checkpoints are damaged.
    """
    checkpoints = Checkpoints(runs, run.name, run.train.keep_checkpoints)
    if step is not None:
        return use(open_step(checkpoints, step, f"{runs.url}/{run.name}"))
    tried: dict[int, CorruptObjectError | ObjectNotFoundError] = {}
    while left := [step for step in checkpoints.steps() if step not in tried]:
        try:
            return use(checkpoints.open(left[-1]))
        except (CorruptObjectError, ObjectNotFoundError) as exc:
            if not checkpoints.is_source_of(exc):  # about another object that `use` reads
                raise
            if left[-1] in checkpoints.steps():
                logger.error("skipping the checkpoint of step %d: %s", left[-1], exc)
            tried[left[-1]] = exc.with_traceback(None)  # a traceback keeps the dictionary alive
    if tried:
        raise tried[max(tried)]
    return None


def no_checkpoint_error(runs: ObjectStore, run: Run) -> ConfigError:
    """Return the error for a program that needs a checkpoint when the run has none."""
    place = f"{runs.url}/{run.name}"
    return ConfigError(f"{place}: has no checkpoint yet; run `dist-sae train` first")


def suffix(runs: ObjectStore, run: Run, step: int) -> str:
    """Return the suffix for the names of a checkpoint's results.

    It is empty for the newest checkpoint, and contains the step for others.
    """
    steps = Checkpoints(runs, run.name, run.train.keep_checkpoints).steps()
    return "" if step == steps[-1] else f"-step-{step:08d}"


def find_checkpoint(runs: ObjectStore, run: Run, step: int | None) -> Checkpoint | None:
    """Find the checkpoint that `read_trained` tries first. Its parts may be damaged.

    Raises:
        ConfigError: There is no checkpoint of that step.
        PlanMismatchError: The run was trained with other settings.
    """
    checkpoints = Checkpoints(runs, run.name, run.train.keep_checkpoints)
    if step is None:
        checkpoint = checkpoints.latest()
    else:
        checkpoint = open_step(checkpoints, step, f"{runs.url}/{run.name}")
    if checkpoint is not None:
        trained_run(checkpoint, run)
    return checkpoint


def open_step(checkpoints: Checkpoints, step: int, place: str) -> Checkpoint:
    """Open the checkpoint of the step given by `--step`.

    Raises:
        ConfigError: There is no checkpoint of that step.
        CorruptObjectError: The manifest is damaged.
    """
    steps = checkpoints.steps()
    if step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise ConfigError(
            f"--step: {place} has no checkpoint of step {step}; available steps: {there}"
        )
    return checkpoints.open(step)


def trained_run(checkpoint: Checkpoint, run: Run) -> Run:
    """Return the checkpoint's run, after checking that the given run file agrees with it.

    Raises:
        PlanMismatchError: The settings differ.
    """
    return check_same_settings(checkpoint.scalars["run"], run)


def check_same_settings(settings: Mapping[str, Any], run: Run) -> Run:
    """Call `check_same_run`, with a remedy in the error for programs that only read."""
    place = f"{run.store.runs}/{run.name}"
    remedy = (
        f"use the settings that it was trained with, or pass its folder, {place}, as the run file"
    )
    return check_same_run(settings, run, place, remedy)
