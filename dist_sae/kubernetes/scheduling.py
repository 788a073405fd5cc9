"""Check that pods fit on the cluster's nodes. Pure."""

from collections.abc import Mapping

from dist_sae.errors import ConfigError
from dist_sae.kubernetes.cluster import amount
from dist_sae.kubernetes.pods import Object


def check_schedulable(templates: Mapping[str, Object], nodes: list[Object]) -> list[str]:
    """Check that for each part, some node is large enough for a pod.

    Args:
        templates: Pod templates, by part.
        nodes: All nodes of the cluster.

    Returns:
        Warnings about parts that no current node accepts. An autoscaler may add a node.

    Raises:
        ConfigError: Some nodes accept a part's pods, but none of these is large enough.
    """
    warnings, problems = [], []
    for part, template in templates.items():
        spec = template["spec"]
        pool = [node for node in nodes if _accepts(node, spec)]
        lacks = [_lacks(node, requests_of(spec)) for node in pool]
        if not pool:
            wanted = ", ".join(f"{k}={v}" for k, v in spec.get("nodeSelector", {}).items())
            warnings.append(
                f"no current node accepts {part} pods{wanted and f' ({wanted})'}; they stay "
                f"pending until one is added"
            )
        elif all(lacks):
            problems.append(
                f"cluster.{part}: a pod fits on none of the {len(pool)} nodes that accept it "
                f"(closest: {min(lacks, key=len)}); request less, or use --ignore-nodes if larger "
                f"nodes will be added"
            )
    if problems:
        raise ConfigError("\n".join(problems))
    return warnings


def _accepts(node: Object, spec: Object) -> bool:
    labels = node["metadata"].get("labels") or {}
    if spec.get("nodeSelector", {}).items() - labels.items():
        return False
    taints = node["spec"].get("taints") or []
    return all(
        taint["effect"] == "PreferNoSchedule"
        or any(_tolerates(toleration, taint) for toleration in spec.get("tolerations", []))
        for taint in taints
        if not taint["key"].startswith("node.kubernetes.io/")  # temporary, such as not-ready
    )


def _tolerates(toleration: Object, taint: Object) -> bool:
    if toleration.get("effect") not in (None, taint["effect"]):
        return False
    if toleration.get("key") not in (None, taint["key"]):
        return False
    return toleration["operator"] == "Exists" or toleration.get("value") == taint.get("value")


def requests_of(spec: Object) -> dict[str, str]:
    """Return a pod's resource requests: the maximum over its containers, which run in sequence."""
    needed: dict[str, str] = {}
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        for name, quantity in container.get("resources", {}).get("requests", {}).items():
            needed[name] = max(needed.get(name, "0"), quantity, key=amount)
    return needed


def _lacks(node: Object, needed: Mapping[str, str]) -> str:
    """Describe the resources that the node lacks. Empty if the pod fits."""
    has = node["status"]["allocatable"]
    return ", ".join(
        f"needs {name} {quantity}, has {has.get(name, 0)}"
        for name, quantity in needed.items()
        if amount(quantity) > amount(has.get(name, 0))
    )
