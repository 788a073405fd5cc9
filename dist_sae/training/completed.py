"""Checks whether a run, or its activation set, is complete."""

from typing import Any

from dist_sae.checkpoint.layout import Checkpoint, Checkpoints
from dist_sae.checkpoint.lineage import Lineage
from dist_sae.config import Run, jobs_of
from dist_sae.config.fingerprint import as_begun, check_same_run
from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.backlog import ReadyUnits
from dist_sae.data.plan import load_plan, resolve_from_plan
from dist_sae.errors import PlanMismatchError
from dist_sae.storage import ObjectStore, open_store


def completed_result(run: Run) -> dict[str, float] | None:
    """Return the result of training if the run is complete, else None. The run is not a sweep.

    Call this before the rendezvous. A rank that is restarted after the others have finished would
    otherwise wait for them until the timeout.

    Raises:
        PlanMismatchError: The run's checkpoints were written with other settings.
    """
    runs = open_store(run.store.runs, run.store.s3)
    checkpoint = Checkpoints(runs, run.name, run.train.keep_checkpoints).latest()
    if checkpoint is None:
        return None
    stored, lineage = checkpoint.scalars["run"], Lineage.from_scalars(checkpoint.scalars)
    # the text, the model and the activations may have been deleted by now
    run = resolve_from_plan(run, stream_rows=lineage.stream_rows) or as_begun(run, stored)
    check_settings(checkpoint, run, runs)
    if checkpoint.step < run.steps:
        return None
    rows = checkpoint.step * run.train.batch_rows
    return {"step": checkpoint.step, **lineage.totals(rows)}


def check_settings(checkpoint: Checkpoint, run: Run, runs: ObjectStore) -> None:
    """Check that a checkpoint under the run's name was written with this run's settings.

    Args:
        checkpoint: A checkpoint under the run's name.
        run: The resolved run.
        runs: The store of runs.

    Raises:
        PlanMismatchError: The settings differ.
    """
    remedy = (
        f"restore them, or choose another name: `--set name=OTHER --from {run.name}` continues "
        f"from this run"
    )
    check_same_run(checkpoint.scalars["run"], run, f"{runs.url}/{run.name}", remedy)


def completed_results(run: Run) -> dict[str, Any] | None:
    """Return `train`'s result if the run, or every job of the sweep, is complete; else None.

    Raises:
        PlanMismatchError: A run's checkpoints were written with other settings.
    """
    results = {job.name: completed_result(job) for job in jobs_of(run)}
    if not all(results.values()):
        return None
    return results if run.sweep else results[run.name]


def all_units_exist(run: Run) -> bool:
    """Return True if the activation set contains every unit of the run's plan."""
    store = open_store(run.store.activations, run.store.s3)
    try:
        plan = load_plan(store, run)
    except PlanMismatchError:  # `dist-sae plan` replaces the plan, or reports why it cannot
        return False
    if ReadyUnits(store, plan, lambda _: None).count() < len(plan.train_units):
        return False
    return ActivationSet(store, plan, run.sites).exist(plan.heldout_units)
