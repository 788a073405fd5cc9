"""Changes of the producers alone, if they are a separate Job (`cluster.producer.apart`).

Other parts do not read the producers' settings, so their pods are not replaced. The number of
producers is changed in place. For any other change, the producers' Job is replaced.
"""

import logging
from collections.abc import Collection

from dist_sae.config import Run, differences
from dist_sae.errors import StoreError
from dist_sae.kubernetes.jobs import MIN_PARALLELISM, job_name, with_metrics_port
from dist_sae.kubernetes.names import object_name
from dist_sae.kubernetes.pods import Object, has_own_job
from dist_sae.kubernetes.stored import StoredRun

logger = logging.getLogger(__name__)


def producers_object(run: Run) -> str:
    """Return kind and name of the producers' Job."""
    return f"Job {job_name(run, 'producer')}"


def concerns_producers_only(run: Run, old: Run | None, objects: Collection[str]) -> bool:
    """Return whether a change affects only producers that are and were a separate Job.

    Args:
        run: The run after the change.
        old: The run that was submitted.
        objects: Kinds and names of the objects that change.
    """
    if old is None or not (has_own_job(run, "producer") and has_own_job(old, "producer")):
        return False
    of_producers = {producers_object(run), f"ConfigMap {object_name(run)}"}
    before, after = (each.model_dump(mode="json") for each in (old, with_metrics_port(run)))
    return of_producers.issuperset(objects) and all(
        setting.startswith(("processes.producers:", "cluster.producer."))
        for setting in differences(before, after)
    )


def as_admitted(obj: Object, live: Object | None) -> Object | None:
    """Return the object with Kueue's change to it; None if it cannot be changed any more.

    If Kueue admitted only some of a Job's pods, it has reduced `parallelism`, which must then stay
    as it is.
    """
    if live is None or MIN_PARALLELISM not in (live["metadata"].get("annotations") or {}):
        return obj
    spec = live["spec"]
    if spec["parallelism"] == spec["completions"]:
        return obj
    if MIN_PARALLELISM not in obj["metadata"].get("annotations", {}) or (
        obj["spec"]["completions"] != spec["completions"]
    ):
        return None
    return obj | {"spec": obj["spec"] | {"parallelism": spec["parallelism"]}}


def can_keep_running(run: Run, old: Run | None) -> bool:
    """Return whether running producers may continue under the new number of producers.

    In a store without conditional writes, each producer computes its share of the units from the
    number of producers that it read at its start. After an increase, every unit still has a
    producer. After a decrease, some would have none.
    """
    return old is None or run.processes.producers >= old.processes.producers


def warn_of_idle_producers(run: Run) -> None:
    """Warn if producers will occupy GPUs while the planner is still running."""
    gpus = run.processes.producers * run.cluster.producer.gpus
    if not gpus or not has_own_job(run, "producer"):
        return
    try:
        planned = StoredRun(run).is_planned()
    except StoreError as exc:
        logger.warning("cannot check whether there is a plan yet: %s", exc)
        return
    if not planned:
        logger.warning(
            "there is no plan yet: producers will occupy %d GPUs while they wait for it; to avoid "
            "this, run dist-sae plan first, on a machine that can access the corpus and the store",
            gpus,
        )
