"""Submit, resume and cancel a run on a cluster.

A pod's template cannot be changed, and pods read the run file when they start. So a changed run is
replaced as a whole: its pods save and exit, and new pods continue. The exception is a change of
producers that are a separate Job. Only they are replaced, because no other part reads their
settings.
"""

import copy
import difflib
import logging
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from dist_sae.config import Run, differences, dump_run
from dist_sae.errors import (
    ClusterError,
    ForbiddenError,
    PlanMismatchError,
    RejectedError,
    StoreError,
)
from dist_sae.kubernetes.cluster import Cluster
from dist_sae.kubernetes.cluster_objects import (
    ClusterObjects,
    Say,
    configured_run,
    describe,
    existing_objects,
    find_objects,
    is_ours,
    remove,
    remove_part,
    wait_until_gone,
)
from dist_sae.kubernetes.jobs import RUN_KEY, parts, render_objects, with_metrics_port
from dist_sae.kubernetes.names import TRIAL, selector
from dist_sae.kubernetes.pods import ATTEMPT_KEY, Object, has_own_job, pod_template
from dist_sae.kubernetes.render import to_yaml
from dist_sae.kubernetes.resizing import (
    as_admitted,
    can_keep_running,
    concerns_producers_only,
    producers_object,
    warn_of_idle_producers,
)
from dist_sae.kubernetes.scheduling import check_schedulable
from dist_sae.kubernetes.stored import StoredRun

logger = logging.getLogger(__name__)

_SERVER_METADATA = ("managedFields", "resourceVersion", "uid", "creationTimestamp", "generation")
"""Metadata that the server adds."""


def submit(
    run: Run,
    cluster: Cluster,
    say: Say,
    *,
    dry_run: bool = False,
    replace: bool = False,
    ignore_nodes: bool = False,
) -> dict[str, Any]:
    """Apply the run's objects to the cluster. Does nothing if the cluster has them already.

    Args:
        say: Function that prints a line: a change, or what the command waits for.
        dry_run: Only print the changes.
        replace: Replace a run whose settings differ, if none of these affects the outcome.
        ignore_nodes: Do not check whether pods fit on nodes.

    Returns:
        `outcome`, and each object's change. With `dry_run`, those that a submit would have.

    Raises:
        PlanMismatchError: The name belongs to a run with another configuration.
        ConfigError: The run cannot run on a cluster, or its pods fit on no node.
        ClusterError: The cluster is unreachable or refuses the objects, or it has the run with
            other settings and `replace` is not set.
    """
    objects = render_objects(run)
    live = existing_objects(cluster, run, objects)
    existing = find_objects(cluster, run)
    _name_attempt(run, objects, existing)
    if steps := _completed_step(run, cluster, existing):
        say(f"{run.name} is complete: step {steps} is in {run.store.runs}/{run.name}")
        return {"outcome": "complete", "objects": {}}
    if existing.state == "ending":
        raise ClusterError(
            f"{describe(run, cluster)} is being deleted; wait until it is gone, or: dist-sae resume"
        )
    if not ignore_nodes:
        _check_nodes(run, cluster)

    changes = [_change(cluster, obj, live, replaceable=bool(existing.workloads)) for obj in objects]
    same = all(change.action == "unchanged" for change in changes)
    outcome = "created" if not existing.workloads else "unchanged" if same else "replaced"
    changed = _settings(existing.run, run)
    objects_changed = {change.name for change in changes if change.action != "unchanged"}
    producers_only = existing.state == "running" and concerns_producers_only(
        run, existing.run, objects_changed
    )
    result = {"outcome": outcome, "objects": {change.name: change.action for change in changes}}
    for line in chain.from_iterable(change.lines() for change in changes):
        say(line)
    if outcome == "unchanged":
        say(f"{describe(run, cluster)} already exists ({existing.state}); nothing to change")
        if existing.state == "failed":
            say(f"it has failed ({existing.failure}); to continue: dist-sae resume")
        return result
    if outcome == "replaced":
        say(f"differs from the run on the cluster: {'; '.join(changed)}")
        _validate(cluster, objects)
        if not (replace or dry_run):
            how = "its pods save and exit, and new ones continue"
            how = "only its producers change" if producers_only else how
            raise ClusterError(
                f"{describe(run, cluster)} exists with other settings ({'; '.join(changed)}); "
                f"with --replace, {how}"
            )
    if dry_run:
        say("dry run: nothing was changed")
        return result
    warn_of_idle_producers(run)
    if outcome == "replaced":
        by_name = {change.name: change for change in changes}
        _delete_replaced(run, cluster, existing, by_name, say, producers_only=producers_only)
        if not producers_only:
            _name_attempt(run, objects)
    for change in changes:
        cluster.apply(change.obj)
    say(f"{describe(run, cluster)} is submitted; to watch it: dist-sae status")
    return result


def resume(run: Run, cluster: Cluster, say: Say, *, ignore_nodes: bool = False) -> dict[str, Any]:
    """Continue a run that was cancelled, has failed or is gone from the cluster.

    Raises:
        ClusterError: The run is still running.
        PlanMismatchError: The run is complete, or its name belongs to a run with another
            configuration.
    """
    render_objects(run)  # reports problems before anything is deleted
    existing = find_objects(cluster, run)
    if steps := _completed_step(run, cluster, existing):
        raise PlanMismatchError(
            f"{run.store.runs}/{run.name}: is complete at step {steps}; to train for longer, "
            f"raise train.rows and choose another name"
        )
    if existing.state == "running":
        raise ClusterError(f"{describe(run, cluster)} is still running; see dist-sae status")
    if existing.state == "ending":
        wait_until_gone(cluster, selector(run), existing.workloads, say)
    elif existing.workloads:
        failed = f"failed ({existing.failure})" if existing.state == "failed" else ""
        how = failed or "ended before the run was complete"
        say(f"{describe(run, cluster)} has {how}; deleting its objects")
        remove(cluster, run, existing, say)
    return submit(run, cluster, say, ignore_nodes=ignore_nodes)


def cancel(run: Run, cluster: Cluster, say: Say) -> dict[str, Any]:
    """Delete the run's objects from the cluster. Its pods save, and the store is not touched."""
    existing = find_objects(cluster, run)
    if not existing.objects:
        say(f"{describe(run, cluster)} is not on the cluster: nothing to cancel")
        return {"outcome": "absent", "objects": {}}
    remove(cluster, run, existing, say)
    say(
        f"{describe(run, cluster)} is deleted; its data stays in the store. "
        f"To continue: dist-sae resume"
    )
    return {"outcome": "cancelled", "objects": {_name(obj): "deleted" for obj in existing.objects}}


@dataclass(frozen=True)
class _Change:
    """The effect that applying an object has."""

    obj: Object
    live: Object | None
    applied: Object | None
    """The object after the change; None if it cannot be changed."""

    @property
    def name(self) -> str:
        return _name(self.obj)

    @cached_property
    def action(self) -> str:
        if self.live is None:
            return "create"
        if self.applied is None:
            return "replace"
        return "unchanged" if _requested(self.live) == _requested(self.applied) else "change"

    def lines(self) -> Iterator[str]:
        """Yield the change as a unified diff."""
        if self.action == "unchanged":
            return
        yield f"{self.action} {self.name}"
        if self.live and self.applied:
            before, after = (
                to_yaml([_requested(obj)]).splitlines() for obj in (self.live, self.applied)
            )
            for line in list(difflib.unified_diff(before, after, n=2, lineterm=""))[2:]:
                yield f"  {line}"


def _name_attempt(run: Run, objects: list[Object], existing: ClusterObjects | None = None) -> None:
    """Write the attempt's name to the ConfigMap: that of the run on the cluster, or a new one.

    A new name makes pods ignore failures of earlier attempts (`storage/failure.py`).
    """
    if not has_own_job(run, "producer"):
        return
    configuration = existing.configuration if existing and existing.workloads else None
    name = configuration["data"].get(ATTEMPT_KEY) if configuration else uuid.uuid4().hex[:8]
    if name:  # earlier versions wrote none
        objects[0]["data"][ATTEMPT_KEY] = name


def _change(
    cluster: Cluster, obj: Object, live: dict[tuple[str, str], Object], *, replaceable: bool = False
) -> _Change:
    """Find out by a dry run what applying an object would change.

    With `replaceable`, a rejection means that the existing object must be replaced.
    """
    existing = live.get((obj["kind"], obj["metadata"]["name"]))
    admitted = as_admitted(obj, existing)
    # a Job of a JobSet is deleted with the JobSet, and only the JobSet controller may change it
    if admitted is None or (existing and not is_ours(existing)):
        return _Change(obj, existing, None)
    try:
        return _Change(admitted, existing, cluster.apply(admitted, dry_run=True))
    except RejectedError as exc:
        if existing and replaceable:
            return _Change(obj, existing, None)
        raise _invalid(obj, exc) from exc


def _delete_replaced(
    run: Run,
    cluster: Cluster,
    existing: ClusterObjects,
    changes: Mapping[str, _Change],
    say: Say,
    *,
    producers_only: bool,
) -> None:
    """Delete the run, or with `producers_only`, its producers if they cannot keep running."""
    if not producers_only:
        remove(cluster, run, existing, say)
        return
    job = changes[producers_object(run)]
    if job.live and (job.applied is None or not can_keep_running(run, existing.run)):
        remove_part(cluster, run, "producer", job.live, say)


def _validate(cluster: Cluster, objects: list[Object]) -> None:
    """Validate objects on the server under other names. Done before a running run is deleted."""
    for obj in objects:
        trial = copy.deepcopy(obj)
        trial["metadata"]["name"] += TRIAL
        try:
            cluster.apply(trial, dry_run=True)
        except RejectedError as exc:
            raise _invalid(obj, exc) from exc


def _invalid(obj: Object, exc: RejectedError) -> ClusterError:
    return RejectedError(f"the cluster rejected {_name(obj)}: {exc}")


def _completed_step(run: Run, cluster: Cluster, existing: ClusterObjects) -> int | None:
    """Return the last step if the run is complete according to the store, else None.

    Raises:
        PlanMismatchError: The cluster or the store has another run with this name.
    """
    stored = StoredRun(run)
    _check_same(stored, existing.run, f"{describe(run, cluster)} on the cluster")
    try:
        _check_same(stored, stored.started_run(), stored.url)
        return stored.steps if stored.is_complete() else None
    except StoreError as exc:  # perhaps reachable only from the cluster; trainers check again
        logger.warning(
            "cannot check whether the run is complete, or belongs to another configuration: %s", exc
        )
        return None


def _check_same(stored: StoredRun, other: Run | None, where: str) -> None:
    if changed := stored.changes(other):
        raise PlanMismatchError(
            f"{where}: has other settings ({'; '.join(changed)}); restore them or choose "
            f"another name"
        )


def _check_nodes(run: Run, cluster: Cluster) -> None:
    try:
        nodes = cluster.nodes()
    except ForbiddenError as exc:
        logger.warning("cannot check whether pods fit on the nodes: %s", exc)
        return
    templates = {str(part): pod_template(run, part) for part in parts(run)}
    for warning in check_schedulable(templates, nodes):
        logger.warning(warning)


def _settings(old: Run | None, new: Run) -> list[str]:
    """List settings that differ from the run on the cluster.

    If none differs, another version of dist_sae rendered the objects, and the list says so.
    """
    before = old.model_dump(mode="json") if old else {}
    changed = differences(before, with_metrics_port(new).model_dump(mode="json"))
    return changed or ["rendered by another version of dist_sae"]


def _requested(obj: Object) -> Object:
    """Return an object without its status and the metadata that the server adds.

    The run file in a ConfigMap is normalized, because pods accept both old and new names of keys.
    """
    metadata = {key: value for key, value in obj["metadata"].items() if key not in _SERVER_METADATA}
    kept = {key: value for key, value in obj.items() if key != "status"} | {"metadata": metadata}
    if obj["kind"] == "ConfigMap" and RUN_KEY in obj.get("data", {}):
        kept["data"] = obj["data"] | {RUN_KEY: dump_run(configured_run(obj))}
    return kept


def _name(obj: Object) -> str:
    return f"{obj['kind']} {obj['metadata']['name']}"
