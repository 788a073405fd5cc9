"""Status of a run's pods by part: which run, and why the others do not. Pure."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dist_sae.config import Run
from dist_sae.errors import EXIT_CRASHED, EXIT_RESUMABLE, EXIT_USER
from dist_sae.kubernetes.jobs import parts
from dist_sae.kubernetes.names import PART
from dist_sae.kubernetes.pods import Object, Part, n_pods

INDEX = "batch.kubernetes.io/job-completion-index"
_ENDED = ("Succeeded", "Failed")
_MEANING = {
    EXIT_USER: "something to fix",
    EXIT_RESUMABLE: "stopped, resumable",
    EXIT_CRASHED: "a bug",
}
_STARTING = ("ContainerCreating", "PodInitializing")


def describe_parts(run: Run, pods: Iterable[Object], jobs: Iterable[Object]) -> dict[str, Any]:
    """Return the status of all parts of a run, from its pods and Jobs.

    Returns:
        For each part, the number of pods that are `wanted`, `running`, `ready`, `done` (completed)
        and `restarts` (failed and replaced). `last_end` is why the last failed pod ended, or None.
        `pending` lists the pods that do not run yet, with the reasons.
    """
    pods, jobs = list(pods), list(jobs)
    return {part: _part(n_pods(run, part), _of(part, pods), _of(part, jobs)) for part in parts(run)}


def newest_pods(pods: Iterable[Object], before: int = 0) -> list[Object]:
    """Return each index's newest pod, or the pod that was followed by `before` newer ones."""
    by_index: dict[int, list[Object]] = {}
    for pod in sorted(pods, key=lambda pod: pod["metadata"]["creationTimestamp"]):
        by_index.setdefault(index_of(pod), []).append(pod)
    return [by_index[i][-1 - before] for i in sorted(by_index) if len(by_index[i]) > before]


def index_of(pod: Object) -> int:
    """Return the pod's index in its Job."""
    metadata = pod["metadata"]
    for where in ("labels", "annotations"):  # a label since Kubernetes 1.28
        if (index := (metadata.get(where) or {}).get(INDEX)) is not None:
            return int(index)
    return 0


def name_of(obj: Object) -> str:
    """Return the object's name."""
    name: str = obj["metadata"]["name"]
    return name


def has_ended(pod: Object) -> bool:
    """Return whether the pod has ended, so that none of its containers will run again."""
    return pod["status"].get("phase") in _ENDED


def part_of(obj: Object) -> str:
    """Return the part that a pod or Job belongs to."""
    part: str = obj["metadata"]["labels"].get(PART, "")
    return part


def _of(part: Part, objects: Iterable[Object]) -> list[Object]:
    return [obj for obj in objects if part_of(obj) == part]


def _part(wanted: int, pods: list[Object], jobs: list[Object]) -> dict[str, Any]:
    phases = [pod["status"].get("phase", "Pending") for pod in pods]
    failed = [pod for pod in pods if pod["status"].get("phase") == "Failed"]
    alive = [pod for pod in pods if not has_ended(pod)]
    ends = sorted(failed, key=_end_time)
    counted = sum((job.get("status") or {}).get("failed", 0) for job in jobs)
    return {
        "wanted": wanted,
        "running": phases.count("Running"),
        "ready": sum(_condition(pod, "Ready").get("status") == "True" for pod in alive),
        "done": sum((job.get("status") or {}).get("succeeded", 0) for job in jobs),
        "restarts": max(len(failed), counted),  # lost nodes lose pods; Jobs miss some failures
        "last_end": f"{name_of(ends[-1])}: {describe_end(ends[-1])}" if ends else None,
        "pending": [f"{name_of(pod)}: {why}" for pod in alive for why in _waits(pod)],
    }


def describe_end(pod: Object) -> str:
    """Return why a pod ended: a disruption, an eviction, or exit code and last line of output."""
    status = pod["status"]
    disruption = _condition(pod, "DisruptionTarget")
    if disruption.get("status") == "True":
        return f"{disruption.get('reason', 'disrupted')}: {disruption.get('message', '')}".strip()
    if status.get("reason"):  # Evicted, NodeLost and so on
        return f"{status['reason']}: {status.get('message', '')}".rstrip(": ")
    for container in _containers(status):
        ended = (container.get("state") or {}).get("terminated")
        if ended and ended["exitCode"]:
            meaning = _MEANING.get(ended["exitCode"], ended.get("reason") or "crashed")
            message = (ended.get("message") or "").strip().splitlines()
            return f"exit {ended['exitCode']} ({meaning})" + (f": {message[-1]}" if message else "")
    return "unknown"


def _waits(pod: Object) -> Iterator[str]:
    """Yield the reasons why a pod does not run."""
    scheduled = _condition(pod, "PodScheduled")
    if scheduled.get("status") == "False":
        yield f"{scheduled.get('reason', 'Unschedulable')}: {scheduled.get('message', '')}"
    for container in _containers(pod["status"]):
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting and waiting.get("reason") not in _STARTING:
            yield f"{waiting['reason']}: {waiting.get('message', '')}".rstrip(": ")


def _containers(status: Mapping[str, Any]) -> list[Any]:
    return [
        *(status.get("initContainerStatuses") or []),
        *(status.get("containerStatuses") or []),
    ]


def _end_time(pod: Object) -> str:
    """Return the time when the pod ended, in Kubernetes' text format, which sorts by time."""
    times = [
        ((container.get("state") or {}).get("terminated") or {}).get("finishedAt") or ""
        for container in _containers(pod["status"])
    ]
    return max([*times, str(pod["metadata"]["creationTimestamp"])])


def _condition(pod: Object, kind: str) -> Mapping[str, Any]:
    conditions = pod["status"].get("conditions") or []
    return next((c for c in conditions if c["type"] == kind), {})
