"""Tells whether a run is complete."""

from typing import Any

from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.checkpoint.lineage import Lineage
from dist_sae.config import Run, jobs_of
from dist_sae.config.fingerprint import PLAN_SECTIONS, as_begun, changes
from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.backlog import ReadyUnits
from dist_sae.data.plan import load_plan, planned
from dist_sae.errors import PlanMismatchError
from dist_sae.storage import open_store


def completed_result(run: Run) -> dict[str, float] | None:
    """The result of training, if the run, which is no sweep, is complete; else None.

    Checked before the rendezvous: a rank that is restarted after the others have finished would
    wait for them in vain.
    """
    runs = open_store(run.store.runs, run.store.s3)
    checkpoint = Checkpoints(runs, run.name, run.train.keep_checkpoints).latest()
    if checkpoint is None:
        return None
    stored, lineage = checkpoint.scalars["run"], Lineage.from_scalars(checkpoint.scalars)
    # text, model and activations may be gone by now
    run = planned(run, stream_rows=lineage.stream_rows) or as_begun(run, stored)
    if checkpoint.step < run.steps:
        return None
    if changes(stored, run, but=PLAN_SECTIONS):  # `train` refuses and says why
        return None
    rows = checkpoint.step * run.train.batch_rows
    return {"step": checkpoint.step, **lineage.totals(rows)}


def completed_results(run: Run) -> dict[str, Any] | None:
    """The result of `train`, if the run, or every job of the sweep, is complete; else None."""
    results = {job.name: completed_result(job) for job in jobs_of(run)}
    if not all(results.values()):
        return None
    return results if run.sweep else results[run.name]


def all_units_exist(run: Run) -> bool:
    """True if the activation set holds every unit of the run's plan."""
    store = open_store(run.store.activations, run.store.s3)
    try:
        plan = load_plan(store, run)
    except PlanMismatchError:  # `plan` replaces it or says why not
        return False
    if ReadyUnits(store, plan, lambda _: None).count() < len(plan.train_units):
        return False
    return ActivationSet(store, plan, run.sites).exist(plan.heldout_units)
