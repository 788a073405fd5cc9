"""Status of a run from the cluster, its store and its metrics.

If one of the three is unreachable, the status of the others is still shown.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from dist_sae.config import Run, jobs_of
from dist_sae.errors import ClusterError, DistSaeError
from dist_sae.kubernetes.cluster import Cluster
from dist_sae.kubernetes.cluster_objects import find_objects
from dist_sae.kubernetes.names import selector
from dist_sae.kubernetes.pod_status import describe_parts, name_of, newest_pods, part_of
from dist_sae.kubernetes.pods import Object, Part
from dist_sae.kubernetes.queue import UID_LABEL, describe_warnings, describe_workloads
from dist_sae.kubernetes.stored import StoredRun
from dist_sae.telemetry.metrics import listed
from dist_sae.telemetry.scrape import Sample, read_page
from dist_sae.training.limits import describe_limit, describe_slow

_HISTORY = "the run's history"


def read_status(run: Run, cluster: Cluster, stored: StoredRun) -> dict[str, Any]:
    """Read the status of a run.

    Returns:
        A mapping with these keys:

        - `state`, `parts` and `conditions`, from the cluster
        - `queued` and `events`: why a running run lacks pods, by Kueue and by warnings about Jobs
        - `store`: progress according to the store
        - `numbers`: the last metrics of training, and where they are `from`
        - `jobs`: the same for each job of a sweep
        - `index_rows_per_second`: speed of the first index worker
        - `limit`: what limits the run's speed, and `limit_of`, the period that this is judged by
        - `warnings`
        - `out_of_reach`: which of the sources could not be reached, and why
    """
    out_of_reach: dict[str, str] = {}
    status: dict[str, Any] = {"run": run.name, "namespace": cluster.namespace}
    status |= {"queued": [], "events": []}
    pods: list[Object] = []
    try:
        existing = find_objects(cluster, run)
        pods = cluster.find("Pod", selector(run))
        jobs = cluster.find("Job", selector(run))
        status |= {
            "state": existing.state,
            "parts": describe_parts(run, pods, jobs),
            "conditions": existing.conditions,
        }
    except ClusterError as exc:
        out_of_reach["cluster"] = str(exc)
        status |= {"state": "unknown", "parts": {}, "conditions": []}
    else:
        if existing.state == "running":
            status |= _waiting(cluster, [*existing.workloads, *jobs], out_of_reach)
    of_jobs: dict[str, dict[str, Any] | None] = {}
    slowest_stage: str | None = None
    index_pace: float | None = None
    warnings: list[str] = []
    try:
        of_jobs |= _live_numbers(run, cluster, pods)
        slowest_stage = _slowest_stage(run, cluster, pods)
        index_pace = _index_pace(run, cluster, pods)
    except (ClusterError, ValueError) as exc:  # ValueError: the response is not a metrics page
        out_of_reach["metrics"] = str(exc)
    try:
        status["store"] = stored.progress()
        if changed := stored.changes(stored.started_run()):
            differing = "; ".join(changed)
            warnings.append(f"this run file differs from the run in the store: {differing}")
        for name, job in (stored.jobs or {run.name: stored}).items():
            of_jobs[name] = of_jobs.get(name) or _stored_numbers(job)
    except DistSaeError as exc:
        out_of_reach["store"] = str(exc)
        status["store"] = None
    numbers = next(filter(None, of_jobs.values()), None)  # a sweep's first job that has any
    return status | {
        "jobs": of_jobs if run.sweep else {},
        "numbers": numbers,
        "index_rows_per_second": index_pace,
        "limit": _limit(numbers, slowest_stage, status["store"] or {}),
        "limit_of": _limit_of(numbers, slowest_stage),
        "warnings": [*_slow_saves(run, numbers), *warnings],
        "out_of_reach": out_of_reach,
    }


def _waiting(
    cluster: Cluster, owners: list[Object], out_of_reach: dict[str, str]
) -> dict[str, list[str]]:
    """Return why pods of these objects are missing: `queued` by Kueue, and `events`."""
    uids = {owner["metadata"]["uid"]: None for owner in owners}  # plain Jobs occur twice
    found: dict[str, list[str]] = {}
    try:
        workloads = [w for uid in uids for w in cluster.find("Workload", {UID_LABEL: uid})]
        found["queued"] = describe_workloads(workloads)
        found["events"] = describe_warnings(cluster.warnings(), uids)
    except ClusterError as exc:
        out_of_reach["queue and events"] = str(exc)
    return found


def _live_numbers(run: Run, cluster: Cluster, pods: list[Object]) -> dict[str, dict[str, Any]]:
    """Return each job's metrics from the first trainer pod. Empty if that pod is not running."""
    pod, page = _page(run, cluster, pods, "trainer")
    if not page:
        return {}
    numbers = {}
    for job in jobs_of(run):
        own = [sample for sample in page if sample.labels.get("run") == job.name]
        values = {sample.name: sample.value for sample in own if "phase" not in sample.labels}
        found = {m.short: values[m.name] for m in listed("status") if m.name in values}
        if run.sweep and not found:  # not started yet, or ended before this pod started
            continue
        phases = _sums(own, "dist_sae_train_phase_share", "phase")  # rank 0 reports all ranks
        slow = (
            describe_slow(sample.labels["slowest"], sample.labels["host"], sample.value)
            for sample in own
            if sample.name == "dist_sae_train_slowest_ratio"
        )
        more = {"phases": phases, "slow": next(slow, None), "from": f"pod {pod}"}
        numbers[job.name] = found | more
    return numbers


def _slowest_stage(run: Run, cluster: Cluster, pods: list[Object]) -> str | None:
    """Return the first producer's slowest stage, or None if that pod is not running."""
    _, page = _page(run, cluster, pods, "producer")
    stages = _sums(page, "dist_sae_produce_seconds_total", "stage")
    return max(stages, key=lambda stage: stages[stage]) if any(stages.values()) else None


def _index_pace(run: Run, cluster: Cluster, pods: list[Object]) -> float | None:
    """Return the first index worker's rows per second, or None if it is not encoding."""
    _, page = _page(run, cluster, pods, "index")
    pace = [sample.value for sample in page if sample.name == "dist_sae_index_rows_per_second"]
    return max(pace, default=None)


def _page(
    run: Run, cluster: Cluster, pods: list[Object], part: Part
) -> tuple[str | None, list[Sample]]:
    """Return name and metrics of a part's first pod. None and empty if it is not running."""
    for pod in newest_pods(pod for pod in pods if part_of(pod) == part)[:1]:
        if pod["status"].get("phase") == "Running":
            port = run.telemetry.port or run.cluster.port
            return name_of(pod), read_page(cluster.proxy(name_of(pod), port, "metrics"))
    return None, []


def _sums(page: list[Sample], name: str, label: str) -> dict[str, float]:
    """Sum a metric over the ranks of a pod, by label."""
    sums: defaultdict[str, float] = defaultdict(float)
    for sample in page:
        if sample.name == name:
            sums[sample.labels[label]] += sample.value
    return sums


def _stored_numbers(stored: StoredRun) -> dict[str, Any] | None:
    last = stored.last_numbers()
    if last is None:
        return None
    names = [*(metric.short for metric in listed("status")), "phases"]
    found = {name: last[name] for name in names if name in last}
    return found | {"from": _HISTORY}


def _limit(
    numbers: Mapping[str, Any] | None, slowest_stage: str | None, store: Mapping[str, Any]
) -> str | None:
    """Return what currently limits the run, or None if there are no metrics yet."""
    if not numbers and not slowest_stage:
        return None
    known = numbers or {}
    return describe_limit(
        known.get("phases", {}),
        known.get("product_share"),
        slowest_stage,
        known.get("slow"),
        all_produced="units" in store and store["ready_units"] == store["units"],
    )


def _limit_of(numbers: Mapping[str, Any] | None, slowest_stage: str | None) -> str | None:
    """Describe the period that the limit was judged by. Producers report only running totals."""
    since = "all the time since the pods started" if slowest_stage else None
    if not numbers:
        return since
    saved = "saved " if numbers["from"] == _HISTORY else ""
    of_producers = f"; for producers, {since}" if since else ""
    return f"the last {saved}report, over all ranks{of_producers}"


def _slow_saves(run: Run, numbers: Mapping[str, Any] | None) -> list[str]:
    seconds, grace = (numbers or {}).get("checkpoint_seconds", 0), run.cluster.trainer.grace_seconds
    if seconds <= grace / 2:
        return []
    return [
        f"the last checkpoint took {seconds:.0f} s, and pods get {grace} s to save and exit; "
        f"raise cluster.trainer.grace_seconds"
    ]
