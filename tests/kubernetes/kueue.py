"""Kueue's queue: which of the applied objects may run, by its documented rules.

A JobSet or a Job with the label of a queue is a workload, admitted whole: each of its pod sets goes
to the first flavor whose node labels its node selector admits, if all its pods fit into the quota
left there. Its priority is that of its first pod set with a priority class. Higher priorities come
first, then earlier ones; one that does not fit is passed over (BestEffortFIFO). With
`withinClusterQueue: LowerPriority` a workload that does not fit has workloads of lower priority
evicted, the lowest and youngest first, if that makes room. An evicted workload is queued again. A
Job whose number of pods is changed gets another workload, and waits for its admission.
https://kueue.sigs.k8s.io/docs/concepts (cluster_queue, workload, preemption)
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from decimal import Decimal

from dist_sae.kubernetes.cluster import amount
from dist_sae.kubernetes.scheduling import requests_of
from tests.kubernetes.schemas import Object, jobs_of

_LABEL = "kueue.x-k8s.io/queue-name"


class Workload:
    """What Kueue makes of an object.

    Args:
        obj: A JobSet or a Job.
        priorities: Values of priority classes by name.
        age: Number of its creation.
    """

    def __init__(self, obj: Object, priorities: Mapping[str, int], age: int) -> None:
        jobs = list(jobs_of(obj)) or [obj]
        self.name = f"{obj['kind']} {obj['metadata']['name']}"
        self.pods = [(job["spec"]["parallelism"], job["spec"]["template"]["spec"]) for job in jobs]
        classes = [pod["priorityClassName"] for _, pod in self.pods if "priorityClassName" in pod]
        self.priority = priorities[classes[0]] if classes else 0
        self.age = age
        self.admitted = False


def is_ready(parts: Iterable[tuple[int, int, int]]) -> bool:
    """`PodsReady` of a JobSet, which `waitForPodsReady` waits for, and evicts without it.

    Args:
        parts: Of each of its replicated jobs the number that it should have, and of these the ready
            and the succeeded ones.
    """
    return all(ready + succeeded >= replicas for replicas, ready, succeeded in parts)


class Queue:
    """A ClusterQueue.

    Args:
        objects: A ClusterQueue, its flavors, and priority classes.
    """

    def __init__(self, objects: Iterable[Object]) -> None:
        found = list(objects)
        self._priorities = {
            obj["metadata"]["name"]: obj["value"] for obj in found if obj["kind"] == "PriorityClass"
        }
        self._labels = {
            obj["metadata"]["name"]: obj.get("spec", {}).get("nodeLabels", {})
            for obj in found
            if obj["kind"] == "ResourceFlavor"
        }
        (spec,) = (obj["spec"] for obj in found if obj["kind"] == "ClusterQueue")
        assert spec["preemption"] == {"withinClusterQueue": "LowerPriority"}
        (group,) = spec["resourceGroups"]
        self._quota = {
            (flavor["name"], resource["name"]): amount(resource["nominalQuota"])
            for flavor in group["flavors"]
            for resource in flavor["resources"]
        }
        self._covered = set(group["coveredResources"])
        self._workloads: dict[str, Workload] = {}
        self.made = 0
        """Workloads so far."""

    def apply(self, *objects: Object) -> None:
        """Make workloads of objects; one whose pods are as before keeps its workload."""
        for obj in objects:
            if _LABEL not in obj["metadata"]["labels"] or obj["kind"] not in ("Job", "JobSet"):
                continue
            new = Workload(obj, self._priorities, self.made)
            old = self._workloads.get(new.name)
            if old is None or old.pods != new.pods:
                self._workloads[new.name] = new
                self.made += 1
        self._admit()

    def admitted(self) -> list[str]:
        """Kinds and names of the objects that may run, in the order of their creation."""
        return [name for name, workload in self._workloads.items() if workload.admitted]

    def _admit(self) -> None:
        order = sorted(self._workloads.values(), key=lambda each: (-each.priority, each.age))
        for workload in order:
            if not workload.admitted and (evicted := self._in_its_way(workload)) is not None:
                workload.admitted = True
                for other in evicted:
                    other.admitted = False

    def _in_its_way(self, workload: Workload) -> list[Workload] | None:
        """Workloads to evict before this one fits; None if it would not fit then either."""
        running = [each for each in self._workloads.values() if each.admitted]
        lower = [each for each in running if each.priority < workload.priority]
        lower.sort(key=lambda each: (each.priority, -each.age))
        for count in range(len(lower) + 1):
            staying = [each for each in running if each not in lower[:count]]
            if self._fit([*staying, workload]):
                return lower[:count]
        return None

    def _fit(self, workloads: Iterable[Workload]) -> bool:
        used = Counter[tuple[str, str]]()
        for number, pod in (pods for workload in workloads for pods in workload.pods):
            needed = requests_of(pod)
            assert needed.keys() <= self._covered
            wanted = pod.get("nodeSelector", {})
            flavor = next(
                name
                for name, labels in self._labels.items()
                if all(labels.get(key) == value for key, value in wanted.items())
            )
            for resource, quantity in needed.items():
                used[flavor, resource] += number * amount(quantity)
        return all(Decimal(amount) <= self._quota[key] for key, amount in used.items())
