"""Change producers alone, where they are a Job by themselves (`cluster.producer.apart`).

Nobody else reads what the run file says of them, so the other pods stay. The API server changes the
number of pods of a Job in place; for all else the Job is replaced.
"""

import logging
from collections.abc import Collection

from dist_sae.config import Run, differences
from dist_sae.errors import StoreError
from dist_sae.kubernetes.jobs import LEAST, in_pods, job_name
from dist_sae.kubernetes.names import object_name
from dist_sae.kubernetes.pods import Object, is_apart
from dist_sae.kubernetes.stored import StoredRun

logger = logging.getLogger(__name__)


def producers_object(run: Run) -> str:
    """Kind and name of the producers' Job."""
    return f"Job {job_name(run, 'producer')}"


def concerns_producers_only(run: Run, old: Run | None, objects: Collection[str]) -> bool:
    """True if a change concerns nothing but producers, which are a Job by themselves before it too.

    Args:
        run: The run as it shall be.
        old: The run as it was submitted.
        objects: Kinds and names of the objects that change.
    """
    if old is None or not (is_apart(run, "producer") and is_apart(old, "producer")):
        return False
    of_producers = {producers_object(run), f"ConfigMap {object_name(run)}"}
    before, after = (each.model_dump(mode="json") for each in (old, in_pods(run)))
    return of_producers.issuperset(objects) and all(
        setting.startswith(("processes.producers:", "cluster.producer."))
        for setting in differences(before, after)
    )


def as_admitted(obj: Object, live: Object | None) -> Object | None:
    """The object as Kueue has changed it; None if it can be changed no more.

    Of a Job that it admitted in part Kueue has reduced `parallelism`, which nobody else may change.
    """
    if live is None or LEAST not in (live["metadata"].get("annotations") or {}):
        return obj
    spec = live["spec"]
    if spec["parallelism"] == spec["completions"]:
        return obj
    if LEAST not in obj["metadata"].get("annotations", {}) or (
        obj["spec"]["completions"] != spec["completions"]
    ):
        return None
    return obj | {"spec": obj["spec"] | {"parallelism": spec["parallelism"]}}


def can_stay(run: Run, old: Run | None) -> bool:
    """True if producers that run already may go on under the new number of producers.

    Where a store has no conditional writes, each makes its share of the units by the number that it
    has read. More producers leave no unit out; fewer would.
    """
    return old is None or run.processes.producers >= old.processes.producers


def warn_of_idle_producers(run: Run) -> None:
    """Warn if producers will hold GPUs while the planner is at work."""
    gpus = run.processes.producers * run.cluster.producer.gpus
    if not gpus or not is_apart(run, "producer"):
        return
    try:
        planned = StoredRun(run).is_planned()
    except StoreError as exc:
        logger.warning("cannot tell from here whether there is a plan yet: %s", exc)
        return
    if not planned:
        logger.warning(
            "there is no plan yet: producers will hold %d GPUs while they wait for it; to spare "
            "them make it first, on any machine that reaches text and store: dist-sae plan",
            gpus,
        )
