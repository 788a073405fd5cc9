"""Trained dictionaries, read from checkpoints to be evaluated, exported or shown."""

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
    """Settings it was trained with, from the checkpoint, but with the given run file's stores."""
    checkpoint: Checkpoint
    pages: PagedDictionary
    normalisers: SiteNormalisers
    """Scales and means of the sites that it reads and writes."""
    idle_rows: Int[Tensor, " n_latents"]
    """Rows since each latent last fired."""

    suffix: str
    """Suffix for names of results; see `suffix`."""

    @property
    def step(self) -> int:
        """Steps done."""
        return self.checkpoint.step

    @property
    def sae(self) -> Dictionary:
        """The whole dictionary, in memory."""
        return self.pages.whole()

    def check_plan(self, plan: str) -> None:
        """Make sure that the run was trained on the given activation set.

        Args:
            plan: Hash of the set's plan.

        Raises:
            PlanMismatchError: The run was trained on another set.
        """
        check_plan(self.run, self.checkpoint, plan)


def check_plan(run: Run, checkpoint: Checkpoint, plan: str) -> None:
    """Make sure that a run was trained on the activation set with this plan.

    Args:
        run: The run, with its stores.
        checkpoint: Of the run.
        plan: Hash of the plan.

    Raises:
        PlanMismatchError: It was trained on another set.
    """
    if checkpoint.scalars["plan"] != plan:
        raise PlanMismatchError(
            f"{run.store.runs}/{run.name}: was trained on another activation set than "
            f"{run.store.activations}; restore store.activations"
        )


def normalisers_of(run: Run, checkpoint: Checkpoint) -> SiteNormalisers:
    """The normalisers that a run's checkpoint was trained with."""
    return SiteNormalisers.from_scalars(checkpoint.scalars, run.reads, run.writes)


def read_trained(runs: ObjectStore, run: Run, step: int | None = None) -> Trained | None:
    """Read a whole dictionary, by default the newest readable one; None if there is none yet.

    Args and errors: see `use_checkpoint`.
    """
    return use_trained(runs, run, step, lambda trained: trained)


def use_trained(
    runs: ObjectStore,
    run: Run,
    step: int | None,
    use: Callable[[Trained], Result],
    **place: Any,
) -> Result | None:
    """Call `use` with a dictionary that reads its checkpoint as long as it is used.

    Args and errors: see `use_checkpoint`, and for `place` `PagedDictionary`.
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
    """Call `use` with a checkpoint, by default the newest readable one; None if there is none yet.

    By default a damaged checkpoint is logged as an error and the one before it is taken. A running
    trainer may delete a checkpoint while it is read; a newer one is then taken.

    Args:
        runs: The store of runs.
        run: The given run.
        step: Step of the checkpoint; None takes the newest.
        use: Reads it. Called again with another one if this one cannot be read.

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
            if not checkpoints.has_raised(exc):  # something else that `use` reads
                raise
            if left[-1] in checkpoints.steps():
                logger.error("skipping the checkpoint of step %d: %s", left[-1], exc)
            tried[left[-1]] = exc.with_traceback(None)  # it would keep a dictionary in memory
    if tried:
        raise tried[max(tried)]
    return None


def none_yet(runs: ObjectStore, run: Run) -> ConfigError:
    """The error of a program that needs a checkpoint where there is none."""
    place = f"{runs.url}/{run.name}"
    return ConfigError(f"{place}: holds no checkpoint yet; run `dist-sae train` first")


def suffix(runs: ObjectStore, run: Run, step: int) -> str:
    """Suffix for names of a checkpoint's results: empty for the newest, else its step."""
    steps = Checkpoints(runs, run.name, run.train.keep_checkpoints).steps()
    return "" if step == steps[-1] else f"-step-{step:08d}"


def find_checkpoint(runs: ObjectStore, run: Run, step: int | None) -> Checkpoint | None:
    """Find the checkpoint that `read_trained` tries first; its parts may be damaged.

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
    """Open the checkpoint that `--step` names.

    Raises:
        ConfigError: There is no such checkpoint.
        CorruptObjectError: Its manifest is damaged.
    """
    steps = checkpoints.steps()
    if step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise ConfigError(f"--step: {place} has no checkpoint {step}; it has: {there}")
    return checkpoints.open(step)


def trained_run(checkpoint: Checkpoint, run: Run) -> Run:
    """Read a checkpoint's run, which the given run file must agree with.

    Raises:
        PlanMismatchError: The settings differ.
    """
    return check_own(checkpoint.scalars["run"], run)


def check_own(settings: Mapping[str, Any], run: Run) -> Run:
    """Check that two runs agree, with a remedy for programs that only read: `check_same_run`."""
    place = f"{run.store.runs}/{run.name}"
    remedy = f"give the settings it was trained with, or its folder, {place}, as the run file"
    return check_same_run(settings, run, place, remedy)
