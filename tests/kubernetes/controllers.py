"""Job and JobSet controllers. `reconcile` compares the actual with the desired state, and acts.

Supports Indexed Jobs whose pods are not restarted in place, with podReplacementPolicy Failed, and
JobSets that are not restarted as a whole. A pod is replaced after the same pause as by the Job
controller of Kubernetes 1.29 and newer (pkg/controller/job/backoff_utils.go): 10 s, doubled at
every failure, at most 10 min. Failures that a rule ignores count too (kubernetes#130881). With
`backoffLimitPerIndex`, the pause depends on all failures of the index so far. Without it, the pause
depends on failures of the whole Job since a pod last succeeded, and no pod is created during it.
"""

import random
import string
import time
import uuid
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import NamedTuple

from tests.kubernetes.kubelet import ENDED, Pod
from tests.kubernetes.manifests import Object, check_pod, refuse_unknown

_INDEX = "batch.kubernetes.io/job-completion-index"
_JOB = "batch.kubernetes.io/job-name"
_UID = "batch.kubernetes.io/controller-uid"
JOBSET = "jobset.sigs.k8s.io/jobset-name"
_FIRST_PAUSE, _LONGEST_PAUSE = 10.0, 600.0


class Condition(NamedTuple):
    """Final condition of a Job or a JobSet."""

    type: str
    reason: str
    message: str = ""


class Job:
    """An Indexed Job. For each index, it runs pods one after the other until one succeeds.

    Args:
        manifest: The Job.
        make_pod: Function that creates and starts a pod.
        clock: Function that returns the time in seconds, from any start.
    """

    def __init__(
        self,
        manifest: Object,
        make_pod: Callable[[Object], Pod],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name: str = manifest["metadata"]["name"]
        self.uid = str(uuid.uuid4())
        self.spec: Object = manifest["spec"]
        self.condition: Condition | None = None
        self.active: dict[int, Pod] = {}
        self.succeeded: dict[int, Pod] = {}
        self.counted: list[Pod] = []
        """Failed pods that count against the backoff limit."""
        self.ignored: list[Pod] = []
        """Failed pods that do not count against the backoff limit."""
        self.next_start: float | None = None
        """Time at which the first pause of an index ends; None if no index waits."""
        self._clock = clock
        self._counted: Counter[int] = Counter()
        self._failures: Counter[int | None] = Counter()
        """Number of failures that lengthen the pause, by `_pausing`."""
        self._failed_at: dict[int | None, float] = {}
        self._failing: Condition | None = None
        self._deleted = False
        self._make_pod = make_pod
        refuse_unknown("job", self.spec)
        assert self.spec["completionMode"] == "Indexed"
        assert self.spec["podReplacementPolicy"] == "Failed"
        check_pod(self.spec["template"])

    @property
    def pods(self) -> list[Pod]:
        """All pods so far."""
        return [*self.active.values(), *self.succeeded.values(), *self.counted, *self.ignored]

    def delete(self) -> None:
        """Terminate the pods, and create no more."""
        self._deleted = True
        for pod in self.active.values():
            pod.terminate()

    def reconcile(self) -> None:
        for index, pod in list(self.active.items()):
            if pod.phase in ENDED:
                del self.active[index]
                self._judge(index, pod)
        self.next_start = None
        if self.condition or self._deleted:
            return
        if self._failing:
            for pod in self.active.values():
                pod.terminate()
            if not self.active:
                self.condition = self._failing
        elif len(self.succeeded) == self.spec["completions"]:
            self.condition = Condition("Complete", "CompletionsReached")
        else:
            for index in range(self.spec["completions"]):
                free = len(self.active) < self.spec["parallelism"]
                if free and index not in self.active and index not in self.succeeded:
                    self._start(index)

    def _start(self, index: int) -> None:
        """Create the index's pod, unless its pause has not ended."""
        due = self._due(index)
        if due <= self._clock():
            self.active[index] = self._make_pod(self._pod(index))
        else:
            self.next_start = min(due, self.next_start or due)

    def _due(self, index: int) -> float:
        """Return the time at which an index's pause ends, or 0 if there is no pause."""
        pausing = self._pausing(index)
        if not self._failures[pausing]:
            return 0.0
        doubled = min(self._failures[pausing] - 1, 10)
        return self._failed_at[pausing] + min(_FIRST_PAUSE * 2.0**doubled, _LONGEST_PAUSE)

    def _pausing(self, index: int) -> int | None:
        """Return the index if its failures pause only itself; None if the whole Job pauses."""
        return index if "backoffLimitPerIndex" in self.spec else None

    def _judge(self, index: int, pod: Pod) -> None:
        pausing = self._pausing(index)
        if pod.phase == "Succeeded":
            self.succeeded[index] = pod
            self._failures[pausing] = 0
            return
        self._failures[pausing] += 1
        self._failed_at[pausing] = self._clock()
        action, why = self._action(pod)
        (self.ignored if action == "Ignore" else self.counted).append(pod)
        self._counted[index] += action == "Count"
        if self._failing is None:
            self._failing = self._verdict(index, action, why)

    def _verdict(self, index: int, action: str, why: str) -> Condition | None:
        """Return the Job's final condition after a failure; None if the index gets another pod."""
        if action == "FailJob":
            return Condition("Failed", "PodFailurePolicy", why)
        if (limit := self.spec.get("backoffLimitPerIndex")) is None:
            spent = len(self.counted) > self.spec["backoffLimit"]
            return Condition("Failed", "BackoffLimitExceeded", why) if spent else None
        assert self.spec["maxFailedIndexes"] == 0, "a Job goes on without its failed indexes"
        spent = self._counted[index] > limit
        return Condition("Failed", "MaxFailedIndexesExceeded", why) if spent else None

    def _action(self, pod: Pod) -> tuple[str, str]:
        """Return the action of the first matching rule in the podFailurePolicy, and the reason."""
        for rule in self.spec.get("podFailurePolicy", {}).get("rules", []):
            for wanted in rule.get("onPodConditions", []):
                assert wanted.get("status", "True") == "True"
                if wanted["type"] in pod.conditions:
                    return rule["action"], f"pod {pod.name} has condition {wanted['type']}"
            if exits := rule.get("onExitCodes"):
                for name, code in pod.exit_codes.items():
                    listed = (code in exits["values"]) == (exits["operator"] == "In")
                    if code and listed and exits.get("containerName", name) == name:
                        return rule["action"], f"container {name} of {pod.name} ended with {code}"
        return "Count", f"pod {pod.name} has failed"

    def _pod(self, index: int) -> Object:
        pod: Object = deepcopy(self.spec["template"])
        metadata, spec, number = pod["metadata"], pod["spec"], str(index)
        suffix = "".join(random.choices(string.ascii_lowercase, k=5))
        metadata["name"] = f"{self.name}-{index}-{suffix}"
        metadata.setdefault("annotations", {})[_INDEX] = number
        metadata["labels"] |= {_JOB: self.name, _INDEX: number, _UID: self.uid}
        spec["hostname"] = f"{self.name}-{index}"
        field = {"fieldRef": {"fieldPath": f"metadata.annotations['{_INDEX}']"}}
        for container in (*spec["containers"], *spec.get("initContainers", [])):
            entry = {"name": "JOB_COMPLETION_INDEX", "valueFrom": field}
            container["env"] = [*container.get("env", []), entry]
        return pod


class JobSet:
    """A JobSet: Jobs that start in order, and succeed or fail together.

    Args:
        manifest: The JobSet.
        make_job: Function that creates a Job.
    """

    def __init__(self, manifest: Object, make_job: Callable[[Object], Job]) -> None:
        self.name: str = manifest["metadata"]["name"]
        self.spec: Object = manifest["spec"]
        self.condition: Condition | None = None
        self.jobs: dict[str, list[Job]] = {}
        """Jobs by the name of the replicated job."""
        self._make_job = make_job
        refuse_unknown("jobset", self.spec)
        assert self.spec["network"]["enableDNSHostnames"]
        assert not self.spec["failurePolicy"]["maxRestarts"], "JobSets are not restarted here"

    @property
    def service(self) -> Object:
        """Headless Service that gives pods their DNS names."""
        network = self.spec["network"]
        return {
            "metadata": {"name": network.get("subdomain", self.name)},
            "spec": {
                "clusterIP": "None",
                "selector": {JOBSET: self.name},
                "publishNotReadyAddresses": network.get("publishNotReadyAddresses", True),
            },
        }

    def delete(self) -> None:
        for jobs in self.jobs.values():
            for job in jobs:
                job.delete()

    def reconcile(self) -> None:
        """Reconcile the JobSet, without its Jobs."""
        if self.condition:
            return
        for replicated in self.spec["replicatedJobs"]:
            name = replicated["name"]
            if name not in self.jobs and all(map(self._is_met, replicated.get("dependsOn", []))):
                self.jobs[name] = [
                    self._make_job(self._job(replicated, number))
                    for number in range(replicated.get("replicas", 1))
                ]
        jobs = [job for jobs in self.jobs.values() for job in jobs]
        failed = [job for job in jobs if job.condition and job.condition.type == "Failed"]
        if failed:
            self.condition = self._failure(failed[0])
        elif len(self.jobs) == len(self.spec["replicatedJobs"]) and all(j.condition for j in jobs):
            self.condition = Condition("Completed", "AllJobsCompleted")
        if self.condition:
            self.delete()

    def _is_met(self, dependency: Object) -> bool:
        jobs = self.jobs.get(dependency["name"], [])
        if dependency["status"] == "Complete":
            return bool(jobs) and all(j.condition and j.condition.type == "Complete" for j in jobs)
        assert dependency["status"] == "Ready"
        return bool(jobs) and all(
            len(job.succeeded) + sum(pod.ready for pod in job.active.values())
            >= min(job.spec["parallelism"], job.spec["completions"])
            for job in jobs
        )

    def _failure(self, job: Job) -> Condition:
        assert job.condition is not None
        why = f"job {job.name} failed ({job.condition.reason}: {job.condition.message})"
        for rule in self.spec["failurePolicy"].get("rules", []):
            if job.condition.reason in rule.get("onJobFailureReasons", [job.condition.reason]):
                assert rule["action"] == "FailJobSet", rule["action"]
                return Condition("Failed", "FailJobSetFailurePolicyAction", why)
        return Condition("Failed", "ReachedMaxRestarts", why)

    def _job(self, replicated: Object, number: int) -> Object:
        job: Object = deepcopy(replicated["template"])
        name = f"{self.name}-{replicated['name']}-{number}"
        ours = {
            JOBSET: self.name,
            "jobset.sigs.k8s.io/replicatedjob-name": replicated["name"],
            "jobset.sigs.k8s.io/job-index": str(number),
        }
        job["metadata"] = {"name": name, "labels": job["metadata"].get("labels", {}) | ours}
        template = job["spec"]["template"]
        template["metadata"]["labels"] |= ours
        template["spec"]["subdomain"] = self.spec["network"].get("subdomain", self.name)
        return job
