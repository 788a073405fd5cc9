"""`submit` compares the pods of a run with the nodes of the cluster."""

import pytest

from tests.kubernetes.apiserver import ApiServer, Object
from tests.kubernetes.conftest import Shell


def node(name: str, labels: dict[str, str] | None = None, *taints: Object, **has: str) -> Object:
    allocatable = {"cpu": "8", "memory": "32Gi", "ephemeral-storage": "100Gi"} | has
    return {
        "metadata": {"name": name, "labels": labels or {}},
        "spec": {"taints": list(taints)},
        "status": {"allocatable": allocatable},
    }


@pytest.mark.system
def test_pods_that_can_never_fit_are_refused(api: ApiServer, sh: Shell, path: str) -> None:
    taint = {"key": "gpu", "effect": "NoSchedule", "value": "yes"}
    api.nodes = [node("small"), node("gpus", {}, taint, memory="512Gi")]
    large = ("submit", path, "--set", "cluster.trainer.memory=64Gi")
    said = sh.fail(*large)
    assert said == (
        "cluster.trainer: a pod fits on none of the 1 nodes that accept it (closest: needs memory "
        "64Gi, has 32Gi); request less, or use --ignore-nodes if larger nodes will be added"
    )
    assert not api.objects
    for tolerates in ("{key: gpu}", "{key: gpu, operator: Equal, value: 'yes'}"):
        assert "is submitted" in sh(*large, "--set", f"cluster.trainer.tolerations=[{tolerates}]")
        api.objects.clear()
    others = "cluster.trainer.tolerations=[{key: gpu, operator: Equal, value: 'no'}]"
    assert "none of the 1 nodes" in sh.fail(*large, "--set", others)
    assert "is submitted" in sh(*large, "--ignore-nodes")


def test_pods_without_a_node_may_wait_for_one(api: ApiServer, sh: Shell, path: str) -> None:
    api.nodes = [node("cpus"), node("old-gpus", {"gpu": "a100"})]
    select = ("--set", "cluster.trainer.node_selector={gpu: h100}")
    said = sh.warned("submit", path, *select)
    assert (
        "no current node accepts trainer pods (gpu=h100); they stay pending until one is added"
        in said
    )
    assert api.names("JobSet") == ["tiny"]


def test_who_may_not_see_nodes_is_told_so(api: ApiServer, sh: Shell, path: str) -> None:
    api.rules.remove(("", "nodes", "list"))
    said = sh.warned("submit", path)
    assert "ada may not list nodes of the cluster; cluster role dist-sae-nodes of k8s/base" in said
    assert api.names("JobSet") == ["tiny"]
