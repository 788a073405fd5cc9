"""Pod status: scheduling, and the states of containers, which run one after the other."""

from tests.kubernetes.manifests import Object


def names_of(pod: Object) -> list[str]:
    spec = pod["spec"]
    return [each["name"] for each in [*spec.get("initContainers", []), *spec["containers"]]]


def scheduled(pod: Object) -> str | None:
    """Return the status of condition PodScheduled ("True", "False"), or None if absent."""
    conditions = pod["status"].get("conditions", [])
    return next((c["status"] for c in conditions if c["type"] == "PodScheduled"), None)


def state_of(pod: Object, container: str) -> str:
    """Return a container's state: waiting, running, terminated, or "" if its node has no status."""
    status = pod["status"]
    for told in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
        if told["name"] == container:
            return str(next(iter(told["state"])))
    if status["phase"] == "Pending" and scheduled(pod):
        return ""
    return {"Pending": "waiting", "Running": "running"}.get(status["phase"], "terminated")


def render_status(pod: Object, n_ended: int, *, runs: bool = True) -> Object:
    """Render a pod's status with the first `n_ended` containers ended and the next one running.

    With `runs` False, the next one is waiting.
    """
    ended: Object = {"terminated": {"exitCode": 0}}
    running: Object = {"running": {}}
    waiting: Object = {"waiting": {"reason": "PodInitializing"}}
    names = names_of(pod)
    states = [*[ended] * n_ended, running if runs else waiting, *[waiting] * len(names)]
    told = [{"name": name, "state": state} for name, state in zip(names, states, strict=False)]
    return {
        "phase": "Running" if runs and n_ended == len(names) - 1 else "Pending",
        "initContainerStatuses": told[:-1],
        "containerStatuses": told[-1:],
    }
