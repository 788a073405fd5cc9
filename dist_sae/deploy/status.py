"""`dist-sae status`: pods, store and metrics of a run in one view.

Each of them may be out of reach; the others are told all the same.
"""

from collections.abc import Mapping
from typing import Any

from dist_sae.config import Run
from dist_sae.deploy.cluster import Cluster
from dist_sae.deploy.names import selector
from dist_sae.deploy.pods import Object
from dist_sae.deploy.presence import look
from dist_sae.deploy.stored import StoredRun
from dist_sae.deploy.workers import describe_parts, newest_pods, part_of
from dist_sae.errors import ClusterError, DistSaeError
from dist_sae.telemetry.scrape import read_page

NUMBERS = (
    "step",
    "fvu",
    "heldout_fvu",
    "l0_latents",
    "dead_share",
    "rows_per_second",
)
"""Of training, by their names in the history and, with a prefix, among the metrics."""
_SAVE_SECONDS = "dist_sae_checkpoint_seconds"


def read_status(run: Run, cluster: Cluster, stored: StoredRun) -> dict[str, Any]:
    """Where a run is, as one object.

    Returns:
        `state`, `parts` and `conditions` (from the cluster), `store`, `numbers` (the last ones of
        training, and where they are `from`), `warnings`, and `out_of_reach`: what could not be
        asked, and why.
    """
    out_of_reach: dict[str, str] = {}
    status: dict[str, Any] = {"run": run.name, "namespace": cluster.namespace}
    pods: list[Object] = []
    try:
        there = look(cluster, run)
        pods = cluster.find("Pod", selector(run))
        jobs = cluster.find("Job", selector(run))
        status |= {
            "state": there.state,
            "parts": describe_parts(run, pods, jobs),
            "conditions": list(_conditions(there.workloads)),
        }
    except ClusterError as exc:
        out_of_reach["cluster"] = str(exc)
        status |= {"state": "unknown", "parts": {}, "conditions": []}
    numbers: dict[str, Any] | None = None
    try:
        numbers = _live_numbers(run, cluster, pods)
    except (ClusterError, ValueError) as exc:  # or what came is no page of metrics
        out_of_reach["metrics"] = str(exc)
    try:
        status["store"] = stored.progress()
        numbers = numbers or _stored_numbers(stored)
    except DistSaeError as exc:
        out_of_reach["store"] = str(exc)
        status["store"] = None
    return status | {
        "numbers": numbers,
        "warnings": _warnings(run, numbers),
        "out_of_reach": out_of_reach,
    }


def _conditions(workloads: list[Object]) -> list[str]:
    """What the controllers say of a run that is true, in their words."""
    return [
        f"{obj['kind']} {obj['metadata']['name']} {condition['type']}: "
        f"{condition.get('message') or condition.get('reason', '')}"
        for obj in workloads
        for condition in (obj.get("status") or {}).get("conditions") or []
        if condition["status"] == "True"
    ]


def _live_numbers(run: Run, cluster: Cluster, pods: list[Object]) -> dict[str, Any] | None:
    """From the metrics of the first trainer, if it runs."""
    trainers = [pod for pod in pods if part_of(pod) == "trainer"]
    for pod in newest_pods(trainers)[:1]:
        if pod["status"].get("phase") != "Running":
            break
        name = pod["metadata"]["name"]
        page = cluster.proxy(name, run.telemetry.port or run.cluster.port, "metrics")
        values = {sample.name: sample.value for sample in read_page(page)}
        found = {
            n: values[f"dist_sae_train_{n}"] for n in NUMBERS if f"dist_sae_train_{n}" in values
        }
        if _SAVE_SECONDS in values:
            found["checkpoint_seconds"] = values[_SAVE_SECONDS]
        return found | {"from": f"pod {name}"}
    return None


def _stored_numbers(stored: StoredRun) -> dict[str, Any] | None:
    last = stored.last_numbers()
    if last is None:
        return None
    return {name: last[name] for name in NUMBERS if name in last} | {"from": "the run's history"}


def _warnings(run: Run, numbers: Mapping[str, Any] | None) -> list[str]:
    seconds, grace = (numbers or {}).get("checkpoint_seconds", 0), run.cluster.trainer.grace_seconds
    if seconds <= grace / 2:
        return []
    return [
        f"the last checkpoint took {seconds:.0f} s, and pods that are to end have {grace} s; "
        f"raise cluster.trainer.grace_seconds"
    ]
