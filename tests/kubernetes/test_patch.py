"""`pod_patch`: what a run file adds to the pods, merged as an API server would merge it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_sae.config import Run, load_run
from dist_sae.errors import ConfigError
from dist_sae.kubernetes.jobs import render_objects
from dist_sae.kubernetes.patch import merge_patch
from dist_sae.kubernetes.pods import pod_template
from tests.kubernetes.schemas import check

RUN = Path(__file__).parents[2] / "launch/runs/synthetic-topk-cluster.yaml"
RDMA = """
metadata:
  annotations: {sidecar.istio.io/inject: "false"}
  labels: {team: sae, app.kubernetes.io/instance: taken}
spec:
  runtimeClassName: nvidia
  hostNetwork: true
  dnsPolicy: ClusterFirstWithHostNet
  volumes:
    - {name: huge, emptyDir: {medium: HugePages}}
    - {name: scratch, emptyDir: {sizeLimit: 2Gi}}
  containers:
    - name: main
      securityContext: {capabilities: {add: [IPC_LOCK]}}
      resources: {requests: {hugepages-2Mi: 5Gi}, limits: {hugepages-2Mi: 5Gi}}
      volumeMounts: [{name: huge, mountPath: /hugepages}]
      env: [{name: OMP_NUM_THREADS, value: "3"}, {name: FI_PROVIDER, value: efa}]
"""


def patched(patch: str, part: str = "trainer") -> Run:
    flow = yaml.safe_dump(yaml.safe_load(patch), default_flow_style=True, width=10_000).strip()
    return load_run(RUN, [f"cluster.{part}.pod_patch={flow}"])


def test_a_part_gets_what_its_patch_adds_and_keeps_the_rest() -> None:
    run, plain = patched(RDMA), load_run(RUN, [])
    pod, before = pod_template(run, "trainer"), pod_template(plain, "trainer")
    for obj in render_objects(run):
        check(obj)
    assert pod["metadata"]["annotations"] == {"sidecar.istio.io/inject": "false"}
    assert pod["metadata"]["labels"] == before["metadata"]["labels"] | {"team": "sae"}
    assert pod["spec"]["runtimeClassName"] == "nvidia"
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert list(volumes) == ["run", "scratch", "shm", "huge"]
    assert volumes["scratch"]["emptyDir"] == {"sizeLimit": "2Gi"}
    (main,), (was,) = pod["spec"]["containers"], before["spec"]["containers"]
    assert main["image"] == was["image"]
    assert main["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    limits = main["resources"]["limits"]
    assert limits == was["resources"]["limits"] | {"hugepages-2Mi": "5Gi"}
    assert main["volumeMounts"] == [
        *was["volumeMounts"],
        {"name": "huge", "mountPath": "/hugepages"},
    ]
    env = {item["name"]: item.get("value") for item in main["env"]}
    assert (env["OMP_NUM_THREADS"], env["FI_PROVIDER"]) == ("3", "efa")
    assert len(main["env"]) == len(was["env"]) + 1
    assert pod_template(run, "producer") == pod_template(plain, "producer")


@pytest.mark.parametrize(
    ("original", "patch", "merged"),
    [
        ({"a": {"b": 1, "c": 2}}, {"a": {"c": None, "d": 3}}, {"a": {"b": 1, "d": 3}}),
        ({"a": {"b": 1}}, {"a": {"$patch": "replace", "d": 3}}, {"a": {"d": 3}}),
        ({"tolerations": [{"key": "x"}]}, {"tolerations": [{"key": "y"}]}, None),
        (
            {"env": [{"name": "x", "value": "1"}, {"name": "y", "value": "2"}]},
            {"env": [{"name": "x", "$patch": "delete"}, {"name": "y", "value": "3"}]},
            {"env": [{"name": "y", "value": "3"}]},
        ),
        ({}, {"ports": [{"containerPort": 1}]}, {"ports": [{"containerPort": 1}]}),
    ],
)
def test_a_merge_is_a_strategic_one(original: Any, patch: Any, merged: Any) -> None:
    before = copy.deepcopy(original)
    assert merge_patch(original, patch, "") == (patch if merged is None else merged)
    assert original == before


@pytest.mark.parametrize(
    ("patch", "problem"),
    [
        (
            "{specs: {}}",
            "cluster.trainer.pod_patch.specs: use metadata or spec, which contain",
        ),
        (
            "{spec: {containers: [{image: x}]}}",
            "cluster.trainer.pod_patch.spec.containers: every item needs a name",
        ),
        (
            "{spec: {affinity: {$patch: delete}}}",
            "cluster.trainer.pod_patch.spec.affinity.$patch: use replace or merge",
        ),
    ],
)
def test_a_patch_that_cannot_be_merged_is_refused(patch: str, problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        render_objects(patched(patch))
    assert problem in str(refused.value)
