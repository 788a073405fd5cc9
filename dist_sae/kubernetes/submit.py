"""`dist-sae submit|resume|cancel`: a run's objects come, change and go.

A pod's template cannot be changed, and pods read the run file when they start, so a run whose
objects would be others is replaced as a whole: its pods save and end, and new ones go on.
"""

import copy
import difflib
import logging
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

from dist_sae.config import Run, differences
from dist_sae.errors import (
    ClusterError,
    ForbiddenError,
    PlanMismatchError,
    RejectedError,
    StoreError,
)
from dist_sae.kubernetes.cluster import Cluster
from dist_sae.kubernetes.cluster_objects import (
    Presence,
    Say,
    await_end,
    check_own,
    describe,
    look,
    remove,
)
from dist_sae.kubernetes.jobs import in_pods, parts, render_objects
from dist_sae.kubernetes.names import TRIAL
from dist_sae.kubernetes.pods import Object, pod_template
from dist_sae.kubernetes.render import to_yaml
from dist_sae.kubernetes.scheduling import check_fit
from dist_sae.kubernetes.stored import StoredRun

logger = logging.getLogger(__name__)

_SERVERS = ("managedFields", "resourceVersion", "uid", "creationTimestamp", "generation")
"""Metadata that say nothing of what was asked for."""


def submit(
    run: Run,
    cluster: Cluster,
    say: Say,
    *,
    dry_run: bool = False,
    replace: bool = False,
    ignore_nodes: bool = False,
) -> dict[str, Any]:
    """Bring the run to the cluster, or do nothing if it is there already.

    Args:
        run: The run.
        cluster: Where to.
        say: Takes what changes, and what is waited for.
        dry_run: Only say what would be done.
        replace: Replace the run if it is there with other settings that decide nothing.
        ignore_nodes: Do not look whether pods fit on nodes.

    Returns:
        `outcome` (with `dry_run`: what it would be), and the objects with what was done to them.

    Raises:
        PlanMismatchError: The name belongs to a run of another configuration.
        ConfigError: The run cannot be on a cluster, or its pods on any node.
        ClusterError: The cluster cannot be reached or refuses; or the run is there with other
            settings, and `replace` was not given.
    """
    objects = render_objects(run)
    live = check_own(cluster, run, objects)
    there = look(cluster, run)
    _check_same(StoredRun(run), there.run, f"{describe(run, cluster)} on the cluster")
    if steps := _done(run):
        say(f"{run.name} is complete: step {steps} is in {run.store.runs}/{run.name}")
        return {"outcome": "complete", "objects": {}}
    if there.state == "ending":
        raise ClusterError(
            f"{describe(run, cluster)} is being deleted; wait until it is gone, or: dist-sae resume"
        )
    if not ignore_nodes:
        _check_nodes(run, cluster)

    changes = [_change(cluster, obj, live, fixed=bool(there.workloads)) for obj in objects]
    outcome = _outcome(there, changes)
    result = {"outcome": outcome, "objects": {change.name: change.what for change in changes}}
    for line in chain.from_iterable(change.lines() for change in changes):
        say(line)
    if outcome == "unchanged":
        say(f"{describe(run, cluster)} is there already, {there.state}: nothing to change")
        if there.state == "failed":
            say(f"it has failed ({there.failure}); to go on: dist-sae resume")
        return result
    if outcome == "replaced":
        changed = _settings(there.run, run)
        say(f"to be replaced: {'; '.join(changed)}")
        _try_out(cluster, objects)
        if not (replace or dry_run):
            raise ClusterError(
                f"{describe(run, cluster)} is there with other settings ({'; '.join(changed)}); "
                f"with --replace its pods save and end, and new ones go on"
            )
    if dry_run:
        say("a dry run: nothing was done")
        return result
    if outcome == "replaced":
        remove(cluster, run, there, say)
    for obj in objects:
        cluster.apply(obj)
    say(f"{describe(run, cluster)} is submitted; how it goes: dist-sae status")
    return result


def _outcome(there: Presence, changes: list["_Change"]) -> str:
    if not there.workloads:
        return "created"
    same = all(change.what == "unchanged" for change in changes)
    return "unchanged" if same else "replaced"


def resume(run: Run, cluster: Cluster, say: Say, *, ignore_nodes: bool = False) -> dict[str, Any]:
    """Let a run go on that was cancelled, has failed or is gone.

    Raises:
        ClusterError: It is running.
        PlanMismatchError: It is complete, or the name belongs to a run of another configuration.
    """
    render_objects(run)  # says what is wrong before anything is deleted
    there = look(cluster, run)
    _check_same(StoredRun(run), there.run, f"{describe(run, cluster)} on the cluster")
    if steps := _done(run):
        raise PlanMismatchError(
            f"{run.store.runs}/{run.name}: is complete at step {steps}; raise train.rows under "
            f"another name to train for longer"
        )
    if there.state == "running":
        raise ClusterError(f"{describe(run, cluster)} is running; see: dist-sae status")
    if there.state == "ending":
        await_end(cluster, run, there, say)
    elif there.workloads:
        say(f"{describe(run, cluster)} has {_ended(there.state, there.failure)}; removing that")
        remove(cluster, run, there, say)
    return submit(run, cluster, say, ignore_nodes=ignore_nodes)


def cancel(run: Run, cluster: Cluster, say: Say) -> dict[str, Any]:
    """Take the run off the cluster; its pods save, and the store keeps everything."""
    there = look(cluster, run)
    if not there.objects:
        say(f"{describe(run, cluster)} is not on the cluster: nothing to cancel")
        return {"outcome": "absent", "objects": {}}
    remove(cluster, run, there, say)
    say(f"{describe(run, cluster)} is gone; the store keeps what it has. To go on: dist-sae resume")
    return {"outcome": "cancelled", "objects": {_name(obj): "deleted" for obj in there.objects}}


class _Change(NamedTuple):
    """What applying an object does."""

    obj: Object
    live: Object | None
    would: Object | None
    """As it would be; None if it cannot be changed into that."""

    @property
    def name(self) -> str:
        return _name(self.obj)

    @property
    def what(self) -> str:
        if self.live is None:
            return "create"
        if self.would is None:
            return "replace"
        return "unchanged" if _asked(self.live) == _asked(self.would) else "change"

    def lines(self) -> Iterator[str]:
        """For people: as `diff` writes it."""
        if self.what == "unchanged":
            return
        yield f"{self.what} {self.name}"
        if self.live and self.would:
            before, after = (to_yaml([_asked(obj)]).splitlines() for obj in (self.live, self.would))
            for line in list(difflib.unified_diff(before, after, n=2, lineterm=""))[2:]:
                yield f"  {line}"


def _change(
    cluster: Cluster, obj: Object, live: dict[tuple[str, str], Object], *, fixed: bool = False
) -> _Change:
    """Have the server say what applying an object would do; `fixed` ones may refuse to change."""
    there = live.get((obj["kind"], obj["metadata"]["name"]))
    try:
        return _Change(obj, there, cluster.apply(obj, dry_run=True))
    except RejectedError as exc:
        if there and fixed:
            return _Change(obj, there, None)
        raise _invalid(obj, exc) from exc


def _try_out(cluster: Cluster, objects: list[Object]) -> None:
    """Have the server check them under other names: what would be refused costs no running run."""
    for obj in objects:
        trial = copy.deepcopy(obj)
        trial["metadata"]["name"] += TRIAL
        try:
            cluster.apply(trial, dry_run=True)
        except RejectedError as exc:
            raise _invalid(obj, exc) from exc


def _invalid(obj: Object, exc: RejectedError) -> ClusterError:
    return RejectedError(f"the cluster does not take {_name(obj)}: {exc}")


def _check_same(stored: StoredRun, other: Run | None, where: str) -> None:
    if changed := stored.changes(other):
        raise PlanMismatchError(
            f"{where}: is a run with other settings ({'; '.join(changed)}); restore them or choose "
            f"another name"
        )


def _done(run: Run) -> int | None:
    """Steps of a run that is complete by the store, which knows runs of other clusters too.

    Raises:
        PlanMismatchError: Its run of that name is another.
    """
    try:
        stored = StoredRun(run)
        _check_same(stored, stored.begun(), stored.url)
        return stored.steps if stored.is_complete() else None
    except StoreError as exc:  # a store may be for the cluster alone; trainers will look again
        logger.warning("whether the run is complete or another is not known from here: %s", exc)
        return None


def _check_nodes(run: Run, cluster: Cluster) -> None:
    try:
        nodes = cluster.nodes()
    except ForbiddenError as exc:
        logger.warning("whether pods fit on nodes is not known: %s", exc)
        return
    templates = {str(part): pod_template(run, part) for part in parts(run)}
    for warning in check_fit(templates, nodes):
        logger.warning(warning)


def _settings(old: Run | None, new: Run) -> list[str]:
    """How a run file differs from the one that is there; what else differs is this program."""
    there = old.model_dump(mode="json") if old else {}
    changed = differences(there, in_pods(new).model_dump(mode="json"))
    return changed or ["rendered by another version of dist_sae"]


def _ended(state: str, failure: str) -> str:
    return f"failed ({failure})" if state == "failed" else "ended before all was in the store"


def _asked(obj: Object) -> Object:
    """An object without what the server and controllers say of it."""
    metadata = {key: value for key, value in obj["metadata"].items() if key not in _SERVERS}
    return {key: value for key, value in obj.items() if key != "status"} | {"metadata": metadata}


def _name(obj: Object) -> str:
    return f"{obj['kind']} {obj['metadata']['name']}"
