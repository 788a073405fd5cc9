"""Which clients reach which pods, and what a role may do, evaluated by Kubernetes' rules.

A pod that an Ingress policy selects accepts only what one of the selecting policies admits.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from dist_sae.kubernetes.jobs import render_objects
from tests.kubernetes.schemas import Object, templates_of
from tests.kubernetes.test_render import ROOT, kustomized, load


class Pod(NamedTuple):
    labels: dict[str, str]
    ports: dict[str, int]


def pods(name: str) -> dict[str, Pod]:
    """Return a run's pods, by part."""
    run, found = load(f"name={name}"), {}
    for template in (t for obj in render_objects(run) for t in templates_of(obj)):
        labels = template["metadata"]["labels"]
        ports = [port for c in template["spec"]["containers"] for port in c.get("ports", [])]
        named = {port["name"]: port["containerPort"] for port in ports}
        found[labels["app.kubernetes.io/component"]] = Pod(labels, named)
    return found


def selects(selector: Object, labels: dict[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels"}
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def admitted(rule: Object, source: dict[str, str] | None, to: Pod, port: int) -> bool:
    """Tell whether an ingress rule admits a pod of the namespace or, if `source` is None, another
    client.
    """
    ports = [to.ports.get(each["port"], each["port"]) for each in rule.get("ports", [])]
    peers = [peer["podSelector"] for peer in rule.get("from", [])]
    known = not peers or (source is not None and any(selects(peer, source) for peer in peers))
    return known and (not ports or port in ports)


def reaches(policies: list[Object], source: dict[str, str] | None, to: Pod, port: int) -> bool:
    closing = [
        policy["spec"]
        for policy in policies
        if "Ingress" in policy["spec"]["policyTypes"]
        and selects(policy["spec"]["podSelector"], to.labels)
    ]
    rules = [rule for spec in closing for rule in spec.get("ingress", [])]
    return not closing or any(admitted(rule, source, to, port) for rule in rules)


def policies_of(folder: str, *runs: str) -> Iterator[Object]:
    rendered = [obj for name in runs for obj in render_objects(load(f"name={name}"))]
    return (obj for obj in [*kustomized(folder), *rendered] if obj["kind"] == "NetworkPolicy")


@pytest.mark.parametrize("folder", ["base", "overlays/gpu-spot", "overlays/gke"])
def test_only_pods_of_a_run_reach_its_ranks(folder: str) -> None:
    policies, own, other = [*policies_of(folder, "one", "two")], pods("one"), pods("two")
    for part in ("trainer", "producer", "index"):
        # the rendezvous port, and one of the ports that NCCL and gloo choose
        for port in (29_500, 40_000):
            assert reaches(policies, own[part].labels, own["trainer"], port)
            assert not reaches(policies, other[part].labels, own["trainer"], port)
            assert not reaches(policies, {"app": "notebook"}, own["trainer"], port)
            assert not reaches(policies, None, own["trainer"], port)


def test_prometheus_and_status_reach_the_metrics_only() -> None:
    policies, own = [*policies_of("base", "one")], pods("one")
    for part in ("trainer", "producer", "index"):
        assert reaches(policies, None, own[part], own[part].ports["metrics"])
        assert not reaches(policies, None, own[part], own[part].ports["metrics"] + 1)


def test_pods_reach_the_store_of_a_trial() -> None:
    policies = [*policies_of("overlays/local-s3", "one")]
    store = Pod({"app.kubernetes.io/name": "s3"}, {"s3": 8333})
    assert reaches(policies, pods("one")["producer"].labels, store, 8333)
    assert not reaches(policies, None, store, 8333)


def test_researchers_may_do_what_the_runbook_says() -> None:
    """Researchers cannot read Secrets. In other namespaces they can only list nodes."""
    roles = [obj for obj in kustomized("base") if obj["kind"].endswith("Role")]
    rights = {
        (obj["kind"], resource, verb)
        for obj in roles
        for rule in obj["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    steps = re.findall(
        r"kubectl (?:-n \S+ )?(\w+) (\w+)", (ROOT / "monitoring/runbook.md").read_text()
    )
    assert {verb for verb, _ in steps} == {"describe", "delete"}
    for verb, kind in steps:
        assert ("Role", f"{kind}s", {"describe": "get"}.get(verb, verb)) in rights
    assert {right for right in rights if right[0] == "ClusterRole"} == {
        ("ClusterRole", "nodes", "list")
    }
    assert not {right for right in rights if right[1] in {"secrets", "*"} or right[2] == "*"}
