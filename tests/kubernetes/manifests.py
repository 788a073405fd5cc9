"""Fields of a manifest that the pod runner supports."""

from typing import Any

Object = dict[str, Any]

_EXECUTED = {
    "job": {"completionMode", "completions", "parallelism", "backoffLimit", "template"}
    | {"backoffLimitPerIndex", "maxFailedIndexes"}
    | {"podReplacementPolicy", "podFailurePolicy", "ttlSecondsAfterFinished"},
    "jobset": {"network", "failurePolicy", "replicatedJobs", "ttlSecondsAfterFinished"},
    "metadata": {"name", "namespace", "labels", "annotations"},
    "pod": {"restartPolicy", "terminationGracePeriodSeconds", "securityContext", "initContainers"}
    | {"containers", "volumes", "hostname", "subdomain"},
    "container": {"name", "command", "args", "env", "envFrom", "securityContext", "volumeMounts"}
    | {"ports", "startupProbe", "livenessProbe", "readinessProbe"},
    "probe": {"httpGet", "periodSeconds", "timeoutSeconds", "failureThreshold"}
    | {"initialDelaySeconds"},
}
_NOT_HERE = {
    # no effect here: there is one node, no authorization, no image to pull and no limits
    "pod": {"serviceAccountName", "automountServiceAccountToken", "enableServiceLinks"}
    | {"imagePullSecrets", "priorityClassName", "nodeSelector", "tolerations", "affinity"}
    | {"topologySpreadConstraints"},
    "container": {"image", "imagePullPolicy", "resources", "terminationMessagePolicy"},
}


def refuse_unknown(what: str, spec: Object) -> None:
    """Refuse unknown fields, except those known to have no effect here.

    Args:
        what: Kind of the object: `job`, `jobset`, `pod`, `container`, `probe`, or `metadata` (of a
            pod).
        spec: The object.

    Raises:
        NotImplementedError: The object has an unknown field.
    """
    if unknown := set(spec) - _EXECUTED[what] - _NOT_HERE.get(what, set()):
        raise NotImplementedError(f"{what}: this runner does not know {', '.join(sorted(unknown))}")


def check_pod(manifest: Object) -> None:
    """Refuse unknown fields of a pod template.

    Raises:
        NotImplementedError: The template has an unknown field.
    """
    spec = manifest["spec"]
    refuse_unknown("metadata", manifest["metadata"])
    refuse_unknown("pod", spec)
    assert spec["restartPolicy"] == "Never", "containers are not restarted here"
    for container in (*spec["containers"], *spec.get("initContainers", [])):
        refuse_unknown("container", container)
        for name, probe in container.items():
            if name.endswith("Probe"):
                refuse_unknown("probe", probe)
