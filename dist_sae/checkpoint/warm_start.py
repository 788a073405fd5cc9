"""The dictionary that a run begins with: of its parent (`train.parent`), or left for it.

    <run>/warm-start/step-00000400/          the weights, laid out as in a checkpoint

It may be narrower: the first latents are its own, in their order: latent 17 stays latent 17.
"""

import torch

from dist_sae.checkpoint.layout import Checkpoint, Checkpoints
from dist_sae.checkpoint.lineage import Lineage
from dist_sae.checkpoint.state import is_per_latent, weights_of
from dist_sae.config import Run
from dist_sae.config.sae import RoutedConfig
from dist_sae.config.train import ParentConfig
from dist_sae.dictionaries.base import Dictionary
from dist_sae.errors import ConfigError, PlanMismatchError
from dist_sae.storage import ObjectStore


def leave(checkpoint: Checkpoint, runs: ObjectStore, run: Run) -> int:
    """Have a run begin with the weights of a checkpoint; returns the bytes copied.

    With the running mean of the weights if there is one. What was left for the run before goes.

    Raises:
        ConfigError: The run cannot begin with them, or has begun.
        CorruptObjectError: The checkpoint is damaged.
    """
    check(checkpoint, run)
    if Checkpoints(runs, run.name, 1).steps():
        raise ConfigError(f"{runs.url}/{run.name}: has been trained already; choose another name")
    there = _warm_starts(runs, run)
    for step in there.folders():  # a cut-off one too
        there.delete(step)
    weights = weights_of(checkpoint).values()
    kept = ("scale", "run")
    scalars = {name: checkpoint.scalars[name] for name in kept}
    scalars |= Lineage.from_scalars(checkpoint.scalars).to_scalars()
    return there.commit(checkpoint.step, [there.copy(checkpoint, weights)], scalars)


def find(runs: ObjectStore, run: Run, plan: str) -> Checkpoint | None:
    """Checkpoint that a run begins with: its parent's, a converted one, or None.

    Args:
        runs: The store of runs.
        run: The run.
        plan: Hash of the plan that it reads.

    Raises:
        ConfigError: The run cannot begin with it, or there is none.
        PlanMismatchError: The parent was trained on another activation set.
        CorruptObjectError: It is damaged.
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
        raise ConfigError(f"train.parent.run: {place} holds no checkpoint")
    if parent.step not in (None, *steps):
        there = ", ".join(map(str, steps))
        raise ConfigError(f"train.parent.step: {place} has no {parent.step}; there are: {there}")
    checkpoint = checkpoints.open(parent.step or steps[-1])
    check(checkpoint, run)
    if parent.state and width(checkpoint) != run.sae.n_latents:
        raise ConfigError(
            f"train.parent.state: {place} has {width(checkpoint)} latents, not "
            f"{run.sae.n_latents}, so its weights alone can go on; use false"
        )
    if parent.data == "continue" and checkpoint.scalars["plan"] != plan:
        raise PlanMismatchError(
            f"train.parent.data: {place} was trained on another activation set than "
            f"{run.store.activations}; restore store.activations, or use restart"
        )
    return checkpoint


def check(checkpoint: Checkpoint, run: Run) -> None:
    """Make sure that the run's dictionary is the same kind and of the same site, and no narrower.

    Raises:
        ConfigError: It is not.
    """
    kind, n_latents = checkpoint.scalars["run"]["sae"]["kind"], width(checkpoint)
    if kind != run.sae.kind:
        raise ConfigError(
            f"{run.name}: sae.kind: {run.sae.kind} cannot begin with the weights of {kind}"
        )
    settings = checkpoint.scalars["run"]
    site = settings["train"].get("site") or settings["activations"]["sites"][0]
    if site != run.site:
        raise ConfigError(
            f"{run.name}: train.site: {run.site} cannot begin with a dictionary of {site}"
        )
    if isinstance(run.sae, RoutedConfig):
        experts = checkpoint.scalars["run"]["sae"]["experts"]
        if (n_latents, experts) != (run.sae.n_latents, run.sae.experts):
            raise ConfigError(
                f"{run.name}: sae.kind: routed dictionaries cannot be widened: latents would come "
                f"to other experts; train one from the start"
            )
    if n_latents > run.sae.n_latents:
        raise ConfigError(
            f"{run.name}: sae.n_latents: {run.sae.n_latents} is less than the {n_latents} "
            f"that it is to begin with"
        )
    n_new = run.sae.n_latents - n_latents  # each points at what is left of a row
    if run.train.rows != "all" and n_new > run.train.rows:
        raise ConfigError(
            f"{run.name}: train.rows: {run.train.rows} rows are too few for {n_new} new latents"
        )


def width(checkpoint: Checkpoint) -> int:
    """Latents of a checkpoint."""
    return _shape(checkpoint)[0]


def _shape(checkpoint: Checkpoint) -> tuple[int, ...]:
    return checkpoint.manifest.tensors[weights_of(checkpoint)["W_enc"]].shape


@torch.no_grad()
def load(sae: Dictionary, checkpoint: Checkpoint) -> None:
    """Fill the first latents, and what all latents share.

    Raises:
        ConfigError: The activations are of another width.
        CorruptObjectError: A part is damaged.
    """
    _, d_in = _shape(checkpoint)
    if d_in != len(sae.b_dec):
        raise ConfigError(
            f"{checkpoint.store.url}: the dictionary to begin with is of activations "
            f"{d_in} wide, these are {len(sae.b_dec)} wide"
        )
    n_known = min(max(width(checkpoint) - sae.first_latent, 0), len(sae.W_enc))
    weights = weights_of(checkpoint)
    for name, tensor in sae.state_dict().items():
        stored = weights[name]
        if not is_per_latent(sae, name):
            tensor.copy_(checkpoint.read(stored))
        elif n_known:
            tensor[:n_known] = checkpoint.read(stored, sae.first_latent, sae.first_latent + n_known)
    sae.constrain()


def _warm_starts(runs: ObjectStore, run: Run) -> Checkpoints:
    return Checkpoints(runs, run.name, keep=1, folder="warm-start")
