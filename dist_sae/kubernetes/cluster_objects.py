"""What of a run a cluster holds, and how it leaves. Nothing else is ever touched."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import yaml

from dist_sae.config import Run, validate_run
from dist_sae.errors import ClusterError
from dist_sae.kubernetes.cluster import Cluster
from dist_sae.kubernetes.jobs import RUN_KEY
from dist_sae.kubernetes.names import object_name, selector
from dist_sae.kubernetes.pods import Object

Say = Callable[[str], None]
"""Takes a line for whoever waits."""
State = Literal["absent", "running", "ending", "complete", "failed"]


class Presence(NamedTuple):
    """The objects of a run, without what they own themselves."""

    configuration: Object | None
    workloads: list[Object]
    """Its JobSet, or its plain Jobs."""
    services: list[Object]

    @property
    def objects(self) -> list[Object]:
        """All of them, in the order in which they are to go."""
        return [*self.workloads, *self.services, *filter(None, [self.configuration])]

    @property
    def run(self) -> Run | None:
        """The run as it was submitted."""
        if self.configuration is None:
            return None
        name = f"ConfigMap {self.configuration['metadata']['name']}"
        return validate_run(yaml.safe_load(self.configuration["data"][RUN_KEY]), name)

    @property
    def state(self) -> State:
        """How far it is, by what its controllers say."""
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
    def failure(self) -> str:
        """Why it has failed, in the controllers' words."""
        told = [_true_conditions(obj).get("Failed") for obj in self.workloads]
        return "; ".join(filter(None, told))


def look(cluster: Cluster, run: Run) -> Presence:
    """Find the run's objects by their labels."""
    labels = selector(run)
    workloads = [*cluster.find("JobSet", labels), *cluster.find("Job", labels)]
    configurations = cluster.find("ConfigMap", labels)
    return Presence(
        configurations[0] if configurations else None,
        [obj for obj in workloads if _is_ours(obj)],
        [obj for obj in cluster.find("Service", labels) if _is_ours(obj)],
    )


def remove(cluster: Cluster, run: Run, there: Presence, say: Say) -> None:
    """Delete the run's objects, and wait until its pods have saved and are gone."""
    for obj in there.objects:
        cluster.delete(obj)
    if there.workloads:
        await_end(cluster, run, there, say)


def await_end(cluster: Cluster, run: Run, there: Presence, say: Say) -> None:
    """Until what is being deleted is gone, its pods first."""
    said = ""
    for pods in cluster.follow("Pod", selector(run)):
        if not pods:
            break
        seconds = max(pod["spec"].get("terminationGracePeriodSeconds", 30) for pod in pods)
        names = ", ".join(sorted(pod["metadata"]["name"] for pod in pods))
        if said != names:
            say(f"waiting for {len(pods)} pods to save and end (at most {seconds} s each): {names}")
            said = names
    for kind in sorted({obj["kind"] for obj in there.workloads}):
        uids = {obj["metadata"]["uid"] for obj in there.workloads}
        for found in cluster.follow(kind, selector(run)):
            if not uids & {obj["metadata"]["uid"] for obj in found}:
                break


def check_own(cluster: Cluster, run: Run, objects: list[Object]) -> dict[tuple[str, str], Object]:
    """The objects that exist under these names, by kind and name.

    Raises:
        ClusterError: One of them is not this run's.
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
                f"{kind} {cluster.namespace}/{name} exists and is "
                f"{f'of run {owner}' if owner else 'not of this run'}; choose another name"
            )
        found[kind, name] = live
    return found


def describe(run: Run, cluster: Cluster) -> str:
    """The run where it is, for messages."""
    return f"{cluster.namespace}/{object_name(run)}"


def _is_ours(obj: Object) -> bool:
    """Not made by a controller for something of ours."""
    return not obj["metadata"].get("ownerReferences")


def _true_conditions(workload: Object) -> dict[str, str]:
    conditions = workload.get("status", {}).get("conditions") or []
    return {
        condition["type"]: condition.get("message") or condition.get("reason", "")
        for condition in conditions
        if condition["status"] == "True"
    }
