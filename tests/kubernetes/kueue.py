"""Kueue's queue: which of the applied objects may run, by its documented rules.

A JobSet or a Job with the label of a queue is a workload, admitted whole: each of its pod sets goes
to the first flavor whose node labels its node selector admits, if all its pods fit into the quota
left there. Its priority is that of its first pod set with a priority class. Higher priorities come
first, then earlier ones; one that does not fit is passed over (BestEffortFIFO). With
`withinClusterQueue: LowerPriority` a workload that does not fit has workloads of lower priority
evicted, the lowest and youngest first, if that makes room. An evicted workload is queued again.

A Job whose number of pods is changed gets another workload, and waits for its admission. A Job with
`job-min-parallelism` is admitted with fewer pods, as many as fit, if neither room nor preemption
lets in all (partial admission, by default on from Kueue 0.5), and its number may not be changed
while it runs. An elastic Job gets a workload in the place of the old one when there is room for its
rise, and goes on with the old one until then (by default on from Kueue 0.18). No Job is both.
https://kueue.sigs.k8s.io/docs (concepts: cluster_queue, workload, preemption, elastic_workload;
tasks/run/jobs)
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from decimal import Decimal

from dist_sae.kubernetes.cluster import amount
from dist_sae.kubernetes.scheduling import requests_of
from tests.kubernetes.schemas import Object, jobs_of

_LABEL = "kueue.x-k8s.io/queue-name"
_LEAST = "kueue.x-k8s.io/job-min-parallelism"
_ELASTIC = "kueue.x-k8s.io/elastic-job"


class Workload:
    """What Kueue makes of an object.

    Args:
        obj: A JobSet or a Job.
        priorities: Values of priority classes by name.
        age: Number of its creation.
    """

    def __init__(self, obj: Object, priorities: Mapping[str, int], age: int) -> None:
        jobs = list(jobs_of(obj)) or [obj]
        annotations = obj["metadata"].get("annotations", {})
        self.name = f"{obj['kind']} {obj['metadata']['name']}"
        self.pods = [(job["spec"]["parallelism"], job["spec"]["template"]["spec"]) for job in jobs]
        self.least: int | None = None
        if _LEAST in annotations:
            self.least = int(annotations[_LEAST])
            assert obj["kind"] == "Job"
            assert 0 < self.least < self.pods[0][0]
        self.is_elastic = annotations.get(_ELASTIC) == "true"
        assert not (self.least and self.is_elastic)
        classes = [pod["priorityClassName"] for _, pod in self.pods if "priorityClassName" in pod]
        self.priority = priorities[classes[0]] if classes else 0
        self.age = age
        self.admitted: int | None = None
        """Number of its pods that may run; None before its admission."""

    @property
    def count(self) -> int:
        """Number of its pods."""
        return sum(number for number, _ in self.pods)

    def sets(self, count: int) -> Iterable[tuple[int, Object]]:
        """Its pod sets if so many of its pods are admitted."""
        return self.pods if count == self.count else [(count, self.pods[0][1])]


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
        self.restarts = 0
        """Workloads so far whose pods were ended for another size."""

    def apply(self, *objects: Object) -> None:
        """Make workloads of objects; one whose pods are as before keeps its workload."""
        for obj in objects:
            if _LABEL not in obj["metadata"]["labels"] or obj["kind"] not in ("Job", "JobSet"):
                continue
            new = Workload(obj, self._priorities, self.made)
            old = self._workloads.get(new.name)
            if old is not None and old.pods == new.pods:
                continue
            self.made += 1
            if old is not None and old.admitted is not None:
                assert old.least is None, "spec.parallelism: cannot change"
                if new.is_elastic:
                    others = [each for each in self._running() if each is not old]
                    if not self._fit(
                        [*((each, each.admitted or 0) for each in others), (new, new.count)]
                    ):
                        continue  # its slice waits, and the old one goes on
                    new.admitted = new.count
                else:
                    self.restarts += 1
            self._workloads[new.name] = new
        self._admit()

    def admitted(self) -> list[str]:
        """Kinds and names of the objects that may run, in the order of their creation."""
        return [name for name, each in self._workloads.items() if each.admitted is not None]

    def pods_of(self, kind: str) -> int:
        """Number of pods of objects of a kind that may run."""
        found = (each for each in self._workloads.values() if each.name.startswith(f"{kind} "))
        return sum(each.admitted or 0 for each in found)

    def _running(self) -> list[Workload]:
        return [each for each in self._workloads.values() if each.admitted is not None]

    def _admit(self) -> None:
        order = sorted(self._workloads.values(), key=lambda each: (-each.priority, each.age))
        for workload in order:
            if workload.admitted is not None:
                continue
            least = workload.count if workload.least is None else workload.least
            for count in range(workload.count, least - 1, -1):
                if (evicted := self._in_its_way(workload, count)) is not None:
                    workload.admitted = count
                    for other in evicted:
                        other.admitted = None
                    break

    def _in_its_way(self, workload: Workload, count: int) -> list[Workload] | None:
        """Workloads to evict before this one fits; None if it would not fit then either."""
        running = self._running()
        lower = [each for each in running if each.priority < workload.priority]
        lower.sort(key=lambda each: (each.priority, -each.age))
        for number in range(len(lower) + 1):
            staying = [each for each in running if each not in lower[:number]]
            if self._fit([*((each, each.admitted or 0) for each in staying), (workload, count)]):
                return lower[:number]
        return None

    def _fit(self, workloads: Iterable[tuple[Workload, int]]) -> bool:
        used = defaultdict[tuple[str, str], Decimal](Decimal)
        for number, pod in (pods for workload, count in workloads for pods in workload.sets(count)):
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
        return all(number <= self._quota[key] for key, number in used.items())
