"""What an API server fills in where an object says nothing."""

import copy
from typing import Any

Object = dict[str, Any]


def with_defaults(obj: Object) -> Object:
    """Some of the defaults of the kinds that a run consists of."""
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
