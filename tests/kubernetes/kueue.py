"""Kueue's queue: decides which of the applied objects may run, by Kueue's documented rules.

A JobSet or Job with a queue's label is a workload, and is admitted as a whole. Each of its pod sets
goes to the first flavor whose node labels match the pods' node selector, if all of its pods fit
into the remaining quota there. A workload's priority is that of its first pod set with a priority
class. Higher priorities come first, then older workloads. A workload that does not fit is skipped
(BestEffortFIFO). With `withinClusterQueue: LowerPriority`, workloads of lower priority are evicted
if that makes it fit: the lowest priority first, then the youngest. Evicted workloads are queued
again.

If the number of pods of a Job is changed, the Job gets a new workload, and waits for its admission.
A Job with `job-min-parallelism` is admitted with as many pods as fit, if all do not fit even with
preemption (partial admission, on by default since Kueue 0.5). Its number of pods may not be changed
while it runs. An elastic Job continues with its old workload until there is room for the new one
(on by default since Kueue 0.18). A Job cannot be both.
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
    """Kueue's Workload for an object.

    Args:
        obj: A JobSet or a Job.
        priorities: Values of priority classes by name.
        age: Serial number of the workload; lower is older.
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
        """Number of pods that may run; None if the workload is not admitted."""

    @property
    def count(self) -> int:
        """Number of pods."""
        return sum(number for number, _ in self.pods)

    def sets(self, count: int) -> Iterable[tuple[int, Object]]:
        """Return the pod sets if this many pods are admitted."""
        return self.pods if count == self.count else [(count, self.pods[0][1])]


def is_ready(parts: Iterable[tuple[int, int, int]]) -> bool:
    """Return condition `PodsReady` of a JobSet. `waitForPodsReady` evicts a JobSet that lacks it.

    Args:
        parts: For each replicated job, the numbers of replicas, and of ready and succeeded ones.
    """
    return all(ready + succeeded >= replicas for replicas, ready, succeeded in parts)


class Queue:
    """A ClusterQueue.

    Args:
        objects: A ClusterQueue, its flavors, and PriorityClasses.
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
        """Number of workloads created so far."""
        self.restarts = 0
        """Number of times that a workload's pods were ended to change their number."""

    def apply(self, *objects: Object) -> None:
        """Create workloads for objects. An object whose pods are unchanged keeps its workload."""
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
                        continue  # the new workload waits, and the old one continues
                    new.admitted = new.count
                else:
                    self.restarts += 1
            self._workloads[new.name] = new
        self._admit()

    def admitted(self) -> list[str]:
        """Return kinds and names of the objects that may run, in the order of creation."""
        return [name for name, each in self._workloads.items() if each.admitted is not None]

    def pods_of(self, kind: str) -> int:
        """Return the number of pods that may run, over all objects of a kind."""
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
        """Return the workloads to evict to make this one fit; None if that is impossible."""
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
