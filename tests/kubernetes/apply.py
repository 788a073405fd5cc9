"""Server-side apply: merging, defaults and errors."""

import copy
import json
from typing import Any

Object = dict[str, Any]


class RefusedError(Exception):
    """An error response. `reason` is None if it comes from a proxy in front of the API server."""

    def __init__(self, code: int, reason: str | None, message: str, **details: str) -> None:
        super().__init__(message)
        self.code, self.reason, self.details = code, reason, details

    def body(self) -> bytes:
        if self.reason is None:
            return str(self).encode()
        status = {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "code": self.code,
            "reason": self.reason,
            "message": str(self),
            "details": self.details,
        }
        return json.dumps(status).encode()


class NotFoundError(RefusedError):
    """The object does not exist."""

    def __init__(self, plural: str, name: str) -> None:
        super().__init__(404, "NotFound", f'{plural} "{name}" not found', kind=plural, name=name)


def with_defaults(obj: Object) -> Object:
    """Add some defaults, for the kinds of objects that a run has."""
    obj = copy.deepcopy(obj)
    match obj["kind"]:
        case "Service":
            obj["spec"] = {"sessionAffinity": "None", "type": "ClusterIP"} | obj["spec"]
        case "Job":
            _fill_job(obj["spec"])
        case "JobSet":
            obj["spec"] = {"successPolicy": {"operator": "All"}} | obj["spec"]
            for replicated in obj["spec"]["replicatedJobs"]:
                _fill_job(replicated["template"]["spec"])
    return obj


def _fill_job(spec: Object) -> None:
    spec.setdefault("suspend", False)
    pod = spec["template"]["spec"]
    pod.setdefault("dnsPolicy", "ClusterFirst")
    pod.setdefault("schedulerName", "default-scheduler")
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        container.setdefault("terminationMessagePath", "/dev/termination-log")
        for port in container.get("ports", []):
            port.setdefault("protocol", "TCP")
    for volume in pod.get("volumes", []):
        if "configMap" in volume:
            volume["configMap"].setdefault("defaultMode", 420)


def merge(live: Object, before: Object, new: Object) -> Object:
    """Merge a manager's fields, and remove those that it no longer sets. Lists are atomic."""
    merged = {key: value for key, value in live.items() if key not in before or key in new}
    for key, value in new.items():
        if isinstance(value, dict):
            past, old = (d.get(key) for d in (live, before))
            merged[key] = merge(
                past if isinstance(past, dict) else {}, old if isinstance(old, dict) else {}, value
            )
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def find_conflict(theirs: Object, ours: Object, path: str = "") -> str | None:
    for key in theirs.keys() & ours.keys():
        mine, yours = ours[key], theirs[key]
        if isinstance(mine, dict) and isinstance(yours, dict):
            if where := find_conflict(yours, mine, f"{path}.{key}"):
                return where
        elif mine != yours:
            return f"{path}.{key}"
    return None


def check_immutable(live: Object, new: Object) -> None:
    kind, name = live["kind"], live["metadata"]["name"]
    if kind == "Job":
        fixed = ["template", "backoffLimitPerIndex", "podFailurePolicy", "completionMode"]
        both = live["spec"], new["spec"]
        if any(spec["completions"] != spec["parallelism"] for spec in both):
            fixed.append("completions")  # mutable only if equal to parallelism (elastic Jobs)
        for field in fixed:
            if both[0][field] != both[1][field]:
                said = f"spec.{field}: Invalid value: field is immutable"
                raise RefusedError(422, "Invalid", f'Job.batch "{name}" is invalid: {said}')
    if kind == "JobSet" and live["spec"]["replicatedJobs"] != new["spec"]["replicatedJobs"]:
        said = (  # controller-runtime's webhooks respond with 403
            'admission webhook "vjobset.kb.io" denied the request: spec.replicatedJobs: Invalid '
            "value: field is immutable"
        )
        raise RefusedError(403, "Forbidden", said)
