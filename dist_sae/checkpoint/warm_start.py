"""Warm starts: a run's initial dictionary, from its parent (`train.parent`) or copied weights.

    <run>/warm-start/step-00000400/          copied weights, laid out as in a checkpoint

The initial dictionary may be narrower than the run's. Its latents come first and keep their
numbers.
"""

import torch

from dist_sae.checkpoint.layout import Checkpoint, Checkpoints
from dist_sae.checkpoint.lineage import Lineage
from dist_sae.checkpoint.state import is_per_latent, weights_of
from dist_sae.config import Run
from dist_sae.config.run import describe_sites
from dist_sae.config.train import ParentConfig
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.normaliser import scales_of
from dist_sae.errors import ConfigError, PlanMismatchError
from dist_sae.storage import ObjectStore


def prepare(checkpoint: Checkpoint, runs: ObjectStore, run: Run) -> int:
    """Copy a checkpoint's weights for a run to start from. Return the number of bytes copied.

    The running mean of the weights is copied if there is one. Weights copied before are replaced.

    Raises:
        ConfigError: The run cannot start from these weights, or has already been trained.
        CorruptObjectError: The checkpoint is damaged.
    """
    check(checkpoint, run)
    if Checkpoints(runs, run.name, 1).steps():
        raise ConfigError(f"{runs.url}/{run.name}: has already been trained; choose another name")
    there = _warm_starts(runs, run)
    for step in there.folders():  # includes incomplete ones
        there.delete(step)
    weights = weights_of(checkpoint).values()
    scalars = {"run": checkpoint.scalars["run"], **scales_of(checkpoint.scalars)}
    scalars |= Lineage.from_scalars(checkpoint.scalars).to_scalars()
    return there.commit(checkpoint.step, [there.copy(checkpoint, weights)], scalars)


def find(runs: ObjectStore, run: Run, plan: str) -> Checkpoint | None:
    """Find the checkpoint that a run starts from: its parent's, the copied weights, or None.

    Args:
        runs: The store of runs.
        run: The run.
        plan: Hash of the plan of the run's activation set.

    Raises:
        ConfigError: The run cannot start from the checkpoint, or the parent has no such checkpoint.
        PlanMismatchError: The parent was trained on another activation set.
        CorruptObjectError: The checkpoint is damaged.
    """
    if run.train.parent:
        return _parent(runs, run, run.train.parent, plan)
    there = _warm_starts(runs, run)
    steps = there.steps()
    if not steps:
        return None
    checkpoint = there.open(steps[-1])
    check(checkpoint, run)
    return checkpoint


def _parent(runs: ObjectStore, run: Run, parent: ParentConfig, plan: str) -> Checkpoint:
    checkpoints, place = Checkpoints(runs, parent.run, 1), f"{runs.url}/{parent.run}"
    steps = checkpoints.steps()
    if not steps:
        raise ConfigError(f"train.parent.run: {place} has no checkpoint")
    if parent.step not in (None, *steps):
        there = ", ".join(map(str, steps))
        raise ConfigError(
            f"train.parent.step: {place} has no checkpoint of step {parent.step}; "
            f"available steps: {there}"
        )
    checkpoint = checkpoints.open(parent.step or steps[-1])
    check(checkpoint, run)
    if parent.state and width(checkpoint) != run.sae.n_latents:
        raise ConfigError(
            f"train.parent.state: {place} has {width(checkpoint)} latents, not "
            f"{run.sae.n_latents}, so only its weights can be loaded; set this to false"
        )
    if parent.data == "continue" and checkpoint.scalars["plan"] != plan:
        raise PlanMismatchError(
            f"train.parent.data: {place} was trained on a different activation set than "
            f"{run.store.activations}; restore store.activations, or set this to restart"
        )
    return checkpoint


def check(checkpoint: Checkpoint, run: Run) -> None:
    """Check that a run can start from a checkpoint: same kind and sites, and at least as wide.

    Raises:
        ConfigError: The run cannot start from it.
    """
    settings = checkpoint.scalars["run"]
    kind, n_latents = settings["sae"]["kind"], width(checkpoint)
    if kind != run.sae.kind:
        raise ConfigError(
            f"{run.name}: sae.kind: {run.sae.kind} cannot start from the weights of {kind}"
        )
    sae = settings["sae"]
    site = settings["train"].get("site") or settings["activations"]["sites"][0]
    reads = sae.get("reads") or [site]
    sites = describe_sites(reads, sae.get("writes") or reads)
    if sites != run.described_sites:
        key = "sae.reads" if run.sae.reads else "train.site"
        raise ConfigError(
            f"{run.name}: {key}: {run.described_sites} cannot start from a dictionary of {sites}"
        )
    if problem := run.sae.parent_problem(settings["sae"]):
        raise ConfigError(f"{run.name}: sae.{problem}")
    if n_latents > run.sae.n_latents:
        raise ConfigError(
            f"{run.name}: sae.n_latents: {run.sae.n_latents} is less than the {n_latents} "
            f"latents of the initial dictionary"
        )
    n_new = run.sae.n_latents - n_latents  # each is initialized from a row's residual
    if run.train.rows != "all" and n_new > run.train.rows:
        raise ConfigError(
            f"{run.name}: train.rows: {run.train.rows} rows are too few for {n_new} new latents"
        )


def width(checkpoint: Checkpoint) -> int:
    """Return the number of latents in a checkpoint."""
    return _shape(checkpoint, "W_enc")[0]


def _shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    return checkpoint.manifest.tensors[weights_of(checkpoint)[name]].shape


@torch.no_grad()
def load(sae: Dictionary, checkpoint: Checkpoint) -> None:
    """Load a checkpoint into the first latents and the replicated tensors.

    Raises:
        ConfigError: The checkpoint is for activations of another width.
        CorruptObjectError: A part is damaged.
    """
    for name in ("W_enc", "W_dec"):
        there, here = _shape(checkpoint, name)[1], sae.get_parameter(name).shape[1]
        if there != here:
            raise ConfigError(
                f"{checkpoint.store.url}: the initial dictionary expects activations of width "
                f"{there}, but got {here}"
            )
    n_known = min(max(width(checkpoint) - sae.first_latent, 0), len(sae.W_enc))
    weights = weights_of(checkpoint)
    for name, tensor in sae.state_dict().items():
        stored = weights[name]
        if not is_per_latent(sae, name):
            checkpoint.fill(tensor, stored)
        elif n_known:
            checkpoint.fill(tensor[:n_known], stored, sae.first_latent)
    sae.constrain()


def _warm_starts(runs: ObjectStore, run: Run) -> Checkpoints:
    return Checkpoints(runs, run.name, keep=1, folder="warm-start")
