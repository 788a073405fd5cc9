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
    await_end,
    configured_run,
    describe,
    existing_objects,
    find_objects,
    is_ours,
    remove,
    remove_part,
)
from dist_sae.kubernetes.jobs import RUN_KEY, in_pods, parts, render_objects
from dist_sae.kubernetes.names import TRIAL, selector
from dist_sae.kubernetes.pods import ATTEMPT_KEY, Object, is_apart, pod_template
from dist_sae.kubernetes.render import to_yaml
from dist_sae.kubernetes.resizing import (
    as_admitted,
    can_stay,
    concerns_producers_only,
    producers_object,
    warn_of_idle_producers,
)
from dist_sae.kubernetes.scheduling import check_schedulable
from dist_sae.kubernetes.stored import StoredRun

logger = logging.getLogger(__name__)

_SERVERS = ("managedFields", "resourceVersion", "uid", "creationTimestamp", "generation")
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
    there = find_objects(cluster, run)
    _name_attempt(run, objects, there)
    if steps := _completed_step(run, cluster, there):
        say(f"{run.name} is complete: step {steps} is in {run.store.runs}/{run.name}")
        return {"outcome": "complete", "objects": {}}
    if there.state == "ending":
        raise ClusterError(
            f"{describe(run, cluster)} is being deleted; wait until it is gone, or: dist-sae resume"
        )
    if not ignore_nodes:
        _check_nodes(run, cluster)

    changes = [_change(cluster, obj, live, fixed=bool(there.workloads)) for obj in objects]
    same = all(change.what == "unchanged" for change in changes)
    outcome = "created" if not there.workloads else "unchanged" if same else "replaced"
    changed = _settings(there.run, run)
    objects_changed = {change.name for change in changes if change.what != "unchanged"}
    alone = there.state == "running" and concerns_producers_only(run, there.run, objects_changed)
    result = {"outcome": outcome, "objects": {change.name: change.what for change in changes}}
    for line in chain.from_iterable(change.lines() for change in changes):
        say(line)
    if outcome == "unchanged":
        say(f"{describe(run, cluster)} is there already, {there.state}: nothing to change")
        if there.state == "failed":
            say(f"it has failed ({there.failure}); to go on: dist-sae resume")
        return result
    if outcome == "replaced":
        say(f"to be replaced: {'; '.join(changed)}")
        _validate(cluster, objects)
        if not (replace or dry_run):
            how = "its pods save and end, and new ones continue"
            how = "only its producers change" if alone else how
            raise ClusterError(
                f"{describe(run, cluster)} is there with other settings ({'; '.join(changed)}); "
                f"with --replace {how}"
            )
    if dry_run:
        say("dry run: nothing was changed")
        return result
    warn_of_idle_producers(run)
    if outcome == "replaced":
        by_name = {change.name: change for change in changes}
        _make_room(run, cluster, there, by_name, say, alone=alone)
        if not alone:
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
    there = find_objects(cluster, run)
    if steps := _completed_step(run, cluster, there):
        raise PlanMismatchError(
            f"{run.store.runs}/{run.name}: is complete at step {steps}; raise train.rows under "
            f"another name to train for longer"
        )
    if there.state == "running":
        raise ClusterError(f"{describe(run, cluster)} is running; see: dist-sae status")
    if there.state == "ending":
        await_end(cluster, selector(run), there.workloads, say)
    elif there.workloads:
        failed = f"failed ({there.failure})" if there.state == "failed" else ""
        how = failed or "ended before the run was complete"
        say(f"{describe(run, cluster)} has {how}; removing that")
        remove(cluster, run, there, say)
    return submit(run, cluster, say, ignore_nodes=ignore_nodes)


def cancel(run: Run, cluster: Cluster, say: Say) -> dict[str, Any]:
    """Delete the run's objects from the cluster. Its pods save, and the store is not touched."""
    there = find_objects(cluster, run)
    if not there.objects:
        say(f"{describe(run, cluster)} is not on the cluster: nothing to cancel")
        return {"outcome": "absent", "objects": {}}
    remove(cluster, run, there, say)
    say(f"{describe(run, cluster)} is gone; the store keeps what it has. To go on: dist-sae resume")
    return {"outcome": "cancelled", "objects": {_name(obj): "deleted" for obj in there.objects}}


@dataclass(frozen=True)
class _Change:
    """The effect that applying an object has."""

    obj: Object
    live: Object | None
    would: Object | None
    """The object after the change; None if it cannot be changed."""

    @property
    def name(self) -> str:
        return _name(self.obj)

    @cached_property
    def what(self) -> str:
        if self.live is None:
            return "create"
        if self.would is None:
            return "replace"
        return "unchanged" if _requested(self.live) == _requested(self.would) else "change"

    def lines(self) -> Iterator[str]:
        """Yield the change as a unified diff."""
        if self.what == "unchanged":
            return
        yield f"{self.what} {self.name}"
        if self.live and self.would:
            before, after = (
                to_yaml([_requested(obj)]).splitlines() for obj in (self.live, self.would)
            )
            for line in list(difflib.unified_diff(before, after, n=2, lineterm=""))[2:]:
                yield f"  {line}"


def _name_attempt(run: Run, objects: list[Object], there: ClusterObjects | None = None) -> None:
    """Write the attempt's name to the ConfigMap: that of the run on the cluster, or a new one.

    A new name makes pods ignore failures of earlier attempts (`storage/failure.py`).
    """
    if not is_apart(run, "producer"):
        return
    configuration = there.configuration if there and there.workloads else None
    name = configuration["data"].get(ATTEMPT_KEY) if configuration else uuid.uuid4().hex[:8]
    if name:  # earlier versions wrote none
        objects[0]["data"][ATTEMPT_KEY] = name


def _change(
    cluster: Cluster, obj: Object, live: dict[tuple[str, str], Object], *, fixed: bool = False
) -> _Change:
    """Find out by a dry run what applying an object would change.

    With `fixed`, a rejection means that the existing object must be replaced.
    """
    there = live.get((obj["kind"], obj["metadata"]["name"]))
    admitted = as_admitted(obj, there)
    # a Job of a JobSet is deleted with the JobSet, and only the JobSet controller may change it
    if admitted is None or (there and not is_ours(there)):
        return _Change(obj, there, None)
    try:
        return _Change(admitted, there, cluster.apply(admitted, dry_run=True))
    except RejectedError as exc:
        if there and fixed:
            return _Change(obj, there, None)
        raise _invalid(obj, exc) from exc


def _make_room(
    run: Run,
    cluster: Cluster,
    there: ClusterObjects,
    changes: Mapping[str, _Change],
    say: Say,
    *,
    alone: bool,
) -> None:
    """Delete what will be replaced: the run, or with `alone` its producers if they cannot stay."""
    if not alone:
        remove(cluster, run, there, say)
        return
    job = changes[producers_object(run)]
    if job.live and (job.would is None or not can_stay(run, there.run)):
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
    return RejectedError(f"the cluster does not take {_name(obj)}: {exc}")


def _completed_step(run: Run, cluster: Cluster, there: ClusterObjects) -> int | None:
    """Return the last step if the run is complete according to the store, else None.

    Raises:
        PlanMismatchError: The cluster or the store has another run with this name.
    """
    stored = StoredRun(run)
    _check_same(stored, there.run, f"{describe(run, cluster)} on the cluster")
    try:
        _check_same(stored, stored.begun(), stored.url)
        return stored.steps if stored.is_complete() else None
    except StoreError as exc:  # perhaps reachable only from the cluster; trainers check again
        logger.warning("cannot tell from here whether the run is complete, or another one: %s", exc)
        return None


def _check_same(stored: StoredRun, other: Run | None, where: str) -> None:
    if changed := stored.changes(other):
        raise PlanMismatchError(
            f"{where}: is a run with other settings ({'; '.join(changed)}); restore them or choose "
            f"another name"
        )


def _check_nodes(run: Run, cluster: Cluster) -> None:
    try:
        nodes = cluster.nodes()
    except ForbiddenError as exc:
        logger.warning("cannot tell whether pods fit on nodes: %s", exc)
        return
    templates = {str(part): pod_template(run, part) for part in parts(run)}
    for warning in check_schedulable(templates, nodes):
        logger.warning(warning)


def _settings(old: Run | None, new: Run) -> list[str]:
    """List settings that differ from the run on the cluster.

    If none differs, another version of dist_sae rendered the objects, and the list says so.
    """
    there = old.model_dump(mode="json") if old else {}
    changed = differences(there, in_pods(new).model_dump(mode="json"))
    return changed or ["rendered by another version of dist_sae"]


def _requested(obj: Object) -> Object:
    """Return an object without its status and the metadata that the server adds.

    The run file in a ConfigMap is normalized, because pods accept both old and new names of keys.
    """
    metadata = {key: value for key, value in obj["metadata"].items() if key not in _SERVERS}
    kept = {key: value for key, value in obj.items() if key != "status"} | {"metadata": metadata}
    if obj["kind"] == "ConfigMap" and RUN_KEY in obj.get("data", {}):
        kept["data"] = obj["data"] | {RUN_KEY: dump_run(configured_run(obj))}
    return kept


def _name(obj: Object) -> str:
    return f"{obj['kind']} {obj['metadata']['name']}"
