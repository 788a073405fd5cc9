"""Whether any node could ever hold a pod. Pure."""

from collections.abc import Mapping

from dist_sae.errors import ConfigError
from dist_sae.kubernetes.cluster import amount
from dist_sae.kubernetes.pods import Object


def check_fit(templates: Mapping[str, Object], nodes: list[Object]) -> list[str]:
    """Returns warnings: parts for which there is no node yet. An autoscaler may add some.

    Args:
        templates: The pods' templates, by part.
        nodes: All nodes of the cluster.

    Raises:
        ConfigError: There are nodes for a part's pods, and not one is large enough.
    """
    warnings, problems = [], []
    for part, template in templates.items():
        spec = template["spec"]
        pool = [node for node in nodes if _admits(node, spec)]
        lacks = [_lacks(node, _requests(spec)) for node in pool]
        if not pool:
            wanted = ", ".join(f"{k}={v}" for k, v in spec.get("nodeSelector", {}).items())
            warnings.append(
                f"no node is for {part} pods now{wanted and f' ({wanted})'}: they wait until one is"
            )
        elif all(lacks):
            problems.append(
                f"cluster.{part}: a pod fits on none of the {len(pool)} nodes that are for it (at "
                f"best: {min(lacks, key=len)}); lower it, or --ignore-nodes if larger ones will be "
                f"added"
            )
    if problems:
        raise ConfigError("\n".join(problems))
    return warnings


def _admits(node: Object, spec: Object) -> bool:
    labels = node["metadata"].get("labels") or {}
    if spec.get("nodeSelector", {}).items() - labels.items():
        return False
    taints = node["spec"].get("taints") or []
    return all(
        taint["effect"] == "PreferNoSchedule"
        or any(_tolerates(toleration, taint) for toleration in spec.get("tolerations", []))
        for taint in taints
        if not taint["key"].startswith("node.kubernetes.io/")  # a state that passes
    )


def _tolerates(toleration: Object, taint: Object) -> bool:
    if toleration.get("effect") not in (None, taint["effect"]):
        return False
    if toleration.get("key") not in (None, taint["key"]):
        return False
    return toleration["operator"] == "Exists" or toleration.get("value") == taint.get("value")


def _requests(spec: Object) -> dict[str, str]:
    """What a pod needs: its containers run one after the other."""
    needed: dict[str, str] = {}
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        for name, quantity in container["resources"]["requests"].items():
            needed[name] = max(needed.get(name, "0"), quantity, key=amount)
    return needed


def _lacks(node: Object, needed: Mapping[str, str]) -> str:
    """What a node has too little of, in words; empty if the pod fits."""
    has = node["status"]["allocatable"]
    return ", ".join(
        f"{name} {quantity}, it has {has.get(name, 0)}"
        for name, quantity in needed.items()
        if amount(quantity) > amount(has.get(name, 0))
    )
