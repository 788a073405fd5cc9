"""Find and delete a run's objects on a cluster. Objects of other runs are never changed."""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import yaml

from dist_sae.config import Run, validate_run
from dist_sae.errors import ClusterError
from dist_sae.kubernetes.cluster import Cluster
from dist_sae.kubernetes.jobs import RUN_KEY
from dist_sae.kubernetes.names import object_name, selector
from dist_sae.kubernetes.pods import Object, Part

Say = Callable[[str], None]
"""Prints a line for the user."""
_NETWORK = ("Service", "NetworkPolicy")
State = Literal["absent", "running", "ending", "complete", "failed"]


class ClusterObjects(NamedTuple):
    """The objects that `submit` applied for a run, without those that controllers created."""

    configuration: Object | None
    workloads: list[Object]
    """JobSet and plain Jobs."""
    network: list[Object]
    """NetworkPolicy, and the Service if there is no JobSet."""

    @property
    def objects(self) -> list[Object]:
        """All objects, in the order in which they are deleted."""
        return [*self.workloads, *self.network, *filter(None, [self.configuration])]

    @property
    def run(self) -> Run | None:
        """The run as it was submitted."""
        return None if self.configuration is None else configured_run(self.configuration)

    @property
    def state(self) -> State:
        """State of the run, according to its workloads' conditions."""
        if any("deletionTimestamp" in obj["metadata"] for obj in self.workloads):
            return "ending"
        ended = [set(_true_conditions(obj)) for obj in self.workloads]
        if any("Failed" in conditions for conditions in ended):
            return "failed"
        if not ended:
            return "absent"
        complete = all(conditions & {"Complete", "Completed"} for conditions in ended)
        return "complete" if complete else "running"

    @property
    def conditions(self) -> list[str]:
        """Conditions of the workloads that are true, one line each."""
        return [
            f"{obj['kind']} {obj['metadata']['name']} {kind}: {message}"
            for obj in self.workloads
            for kind, message in _true_conditions(obj).items()
        ]

    @property
    def failure(self) -> str:
        """Why the run failed, according to its workloads' conditions."""
        messages = [_true_conditions(obj).get("Failed") for obj in self.workloads]
        return "; ".join(filter(None, messages))


def configured_run(configuration: Object) -> Run:
    """Read the run from a ConfigMap, which an earlier version may have rendered."""
    name = f"ConfigMap {configuration['metadata']['name']}"
    return validate_run(yaml.load(configuration["data"][RUN_KEY], Loader=yaml.CSafeLoader), name)


def find_objects(cluster: Cluster, run: Run) -> ClusterObjects:
    """Find the run's objects by their labels."""
    labels = selector(run)
    workloads = [*cluster.find("JobSet", labels), *cluster.find("Job", labels)]
    configurations = cluster.find("ConfigMap", labels)
    return ClusterObjects(
        configurations[0] if configurations else None,
        [obj for obj in workloads if is_ours(obj)],
        [obj for kind in _NETWORK for obj in cluster.find(kind, labels) if is_ours(obj)],
    )


def remove(cluster: Cluster, run: Run, existing: ClusterObjects, say: Say) -> None:
    """Delete the run's objects, and wait until its pods have saved and exited."""
    for obj in existing.objects:
        cluster.delete(obj)
    if existing.workloads:
        wait_until_gone(cluster, selector(run), existing.workloads, say)


def remove_part(cluster: Cluster, run: Run, part: Part, job: Object, say: Say) -> None:
    """Delete a part's separate Job, and wait until its pods have saved and exited."""
    cluster.delete(job)
    wait_until_gone(cluster, selector(run, part), [job], say)


def wait_until_gone(
    cluster: Cluster, labels: Mapping[str, str], workloads: list[Object], say: Say
) -> None:
    """Wait until pods with these labels are gone, then until their deleted workloads are."""
    announced = ""
    for pods in cluster.follow("Pod", labels):
        if not pods:
            break
        seconds = max(pod["spec"].get("terminationGracePeriodSeconds", 30) for pod in pods)
        names = ", ".join(sorted(pod["metadata"]["name"] for pod in pods))
        if announced != names:
            say(
                f"waiting for {len(pods)} pods to save and exit (at most {seconds} s each): {names}"
            )
            announced = names
    for kind in sorted({obj["kind"] for obj in workloads}):
        uids = {obj["metadata"]["uid"] for obj in workloads}
        for found in cluster.follow(kind, labels):
            if not uids & {obj["metadata"]["uid"] for obj in found}:
                break


def existing_objects(
    cluster: Cluster, run: Run, objects: list[Object]
) -> dict[tuple[str, str], Object]:
    """Return the cluster's objects with the kinds and names of these, by kind and name.

    Raises:
        ClusterError: One of the cluster's objects does not belong to this run.
    """
    found = {}
    for obj in objects:
        kind, name = obj["kind"], obj["metadata"]["name"]
        if (live := cluster.get(kind, name)) is None:
            continue
        labels = live["metadata"].get("labels") or {}
        if selector(run).items() - labels.items():
            owner = labels.get("app.kubernetes.io/instance")
            raise ClusterError(
                f"{kind} {cluster.namespace}/{name} already exists and "
                f"{f'belongs to run {owner}' if owner else 'does not belong to this run'}; "
                f"choose another name"
            )
        found[kind, name] = live
    return found


def describe(run: Run, cluster: Cluster) -> str:
    """Return the run's namespace and name, for messages."""
    return f"{cluster.namespace}/{object_name(run)}"


def is_ours(obj: Object) -> bool:
    """Return whether `submit` applied the object; False if a controller created it."""
    return not obj["metadata"].get("ownerReferences")


def _true_conditions(workload: Object) -> dict[str, str]:
    conditions = (workload.get("status") or {}).get("conditions") or []
    return {
        condition["type"]: condition.get("message") or condition.get("reason", "")
        for condition in conditions
        if condition["status"] == "True"
    }
