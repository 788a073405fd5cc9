"""Reasons why pods are missing: Kueue's conditions, and warnings about the run's Jobs. Pure."""

from collections.abc import Collection, Iterable, Iterator

from dist_sae.kubernetes.pods import Object

UID_LABEL = "kueue.x-k8s.io/job-uid"
"""Label of a Kueue Workload with the uid of the JobSet or Job that it belongs to."""


def describe_workloads(workloads: Iterable[Object]) -> list[str]:
    """List the reasons why Kueue does not admit these workloads, or not all of their pods."""
    return [
        f"queue {workload['spec'].get('queueName', '')}: {why}"
        for workload in workloads
        for why in _reasons(workload)
    ]


def describe_warnings(events: Iterable[Object], owners: Collection[str]) -> list[str]:
    """Return the last warning about each of these objects, per reason.

    Args:
        events: Warning events, oldest first.
        owners: Uids of the objects.
    """
    last = {
        (event["involvedObject"].get("name"), event.get("reason")): event.get("message", "")
        for event in events
        if event["involvedObject"].get("uid") in owners
    }
    return [f"{name} {reason}: {message}" for (name, reason), message in last.items()]


def _reasons(workload: Object) -> Iterator[str]:
    status = workload.get("status") or {}
    conditions = {item["type"]: item for item in status.get("conditions") or []}

    def is_true(kind: str) -> bool:
        return bool(conditions.get(kind, {}).get("status") == "True")

    if is_true("Finished"):
        return
    if is_true("Admitted"):
        yield from _admitted_in_part(workload)
        return
    if not workload["spec"].get("active", True):
        yield "deactivated: Kueue will not admit it until spec.active is true again"
    if is_true("Evicted"):
        evicted = conditions["Evicted"]
        yield f"evicted ({evicted.get('reason', '')}): {evicted.get('message', '')}"
    if not is_true("QuotaReserved"):
        reserved = conditions.get("QuotaReserved", {})
        yield reserved.get("message") or "Kueue has not processed it yet; is Kueue installed?"
    for check in status.get("admissionChecks") or []:
        if check.get("state") != "Ready":
            state = f"{check.get('state')}: {check.get('message', '')}"
            yield f"admission check {check['name']} is {state}"


def _admitted_in_part(workload: Object) -> Iterator[str]:
    admission = workload["status"].get("admission") or {}
    admitted = {part["name"]: part.get("count") for part in admission.get("podSetAssignments", [])}
    for part in workload["spec"].get("podSets", []):
        count = admitted.get(part["name"])
        if count is not None and count < part["count"]:
            yield f"admitted {count} of {part['count']} pods (no room for more)"
