"""Producers as a separate Job, which is queued, resized and ended without the trainers."""

import json
from functools import cache
from typing import Any

import pytest

from dist_sae.config import load_run
from dist_sae.kubernetes.jobs import render_objects
from dist_sae.storage.failure import ATTEMPT
from tests.kubernetes.apiserver import ApiServer
from tests.kubernetes.conftest import Shell, ending
from tests.kubernetes.controllers import Condition, Job, JobSet
from tests.kubernetes.kueue import Queue, is_ready
from tests.kubernetes.schemas import VERSIONS, Object, check, jobs_of, security_faults, templates_of
from tests.kubernetes.test_render import ROOT, changed, kustomized, load

APART = ("--set", "cluster.producer.apart=true")
LARGE = ROOT / "launch/runs/llama3.1-8b-resid16-batchtopk-1m-16xh100.yaml"


def test_producers_are_a_job_beside_the_jobset() -> None:
    run = load(
        "cluster.producer.apart=true",
        "cluster.queue=gpus",
        "cluster.producer.queue=spot",
        "cluster.producer.priority_class=low",
    )
    objects = {obj["kind"]: obj for obj in render_objects(run)}
    parts = [job["name"] for job in objects["JobSet"]["spec"]["replicatedJobs"]]
    assert parts == ["planner", "trainer", "index", "reporter"]
    job = objects["Job"]
    together = load("cluster.producer.priority_class=low")
    names = [job["metadata"]["name"] for obj in render_objects(together) for job in jobs_of(obj)]
    assert job["metadata"]["name"] in names  # alerts select Jobs by this name
    queues = [
        objects[k]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] for k in ("JobSet", "Job")
    ]
    assert queues == ["gpus", "spot"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["args"][-1] == "--wait"  # only this flag makes the producers wait for a plan
    policy = objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    for obj in objects.values():
        for template in templates_of(obj):
            assert policy.items() <= template["metadata"]["labels"].items()
            assert not list(security_faults(template))


@pytest.mark.parametrize("version", VERSIONS)
def test_objects_are_valid(version: str) -> None:
    for obj in render_objects(load(*APART[1:], "cluster.queue=gpus", "cluster.producer.least=1")):
        check(obj, version)


@pytest.mark.parametrize(
    ("setting", "annotations"),
    [
        ("least=600", {"kueue.x-k8s.io/job-min-parallelism": "600"}),
        ("elastic=true", {"kueue.x-k8s.io/elastic-job": "true"}),
        ("least=null", {}),
    ],
)
def test_kueue_is_told_how_it_may_admit_producers(
    setting: str, annotations: dict[str, str]
) -> None:
    jobset, job = (obj["metadata"] for obj in large(f"cluster.producer.{setting}")[2:])
    assert job.get("annotations", {}) == annotations
    assert "annotations" not in jobset


def others(api: ApiServer) -> dict[Any, str]:
    """Return the versions of all objects except the producers' and the ConfigMap."""
    return {
        key: obj["metadata"]["resourceVersion"]
        for key, obj in api.objects.items()
        if "producer" not in key[1] and key[0] != "configmaps"
    }


@pytest.mark.system
def test_more_producers_join_those_that_run(api: ApiServer, sh: Shell, path: str) -> None:
    sh("submit", path, *APART)
    before, pods = others(api), api.pods("producer")
    more = ("submit", path, *APART, "--set", "processes.producers=5")
    assert sh.fail(*more) == (
        "dist-sae/tiny exists with other settings (processes.producers: 2 -> 5); with --replace, "
        "only its producers change"
    )
    assert (others(api), api.pods("producer")) == (before, pods)

    said = sh(*more, "--replace")
    assert "differs from the run on the cluster: processes.producers: 2 -> 5" in said
    assert "waiting for" not in said
    assert others(api) == before
    assert api.pods("producer")[:2] == pods
    assert len(api.pods("producer")) == 5
    assert "nothing to change" in sh(*more)
    found = json.loads(sh("status", *more[1:], "--json"))
    assert (found["state"], found["parts"]["producer"]["wanted"]) == ("running", 5)


@pytest.mark.system
@pytest.mark.parametrize(
    "setting", ["processes.producers=1", "cluster.producer.cpus=7", "cluster.producer.retries=9"]
)
def test_what_runs_cannot_stay_is_replaced_alone(
    api: ApiServer, sh: Shell, path: str, setting: str
) -> None:
    """Reducing the number of producers also replaces them: units are split by producer number, so a
    missing number would leave units out.
    """
    sh("submit", path, *APART)
    for pod in api.names("Pod"):
        api.run_pod(pod)
    before, pods = others(api), api.pods("producer")
    with ending(api) as ended:
        sh("submit", path, *APART, "--set", setting, "--replace")
    assert sorted(ended) == pods
    assert others(api) == before
    assert len(api.pods("producer")) == (1 if "producers=" in setting else 2)
    assert not {*api.pods("producer")} & {*pods}


@pytest.mark.system
def test_what_concerns_others_replaces_the_run(api: ApiServer, sh: Shell, path: str) -> None:
    sh("submit", path, *APART)
    both = ("--set", "processes.producers=3", "--set", "processes.trainers=4")
    assert "its pods save and exit, and new ones continue" in sh.fail("submit", path, *APART, *both)
    assert "its pods save and exit" in sh.fail("submit", path)  # producers are a part of the JobSet


@pytest.mark.system
@pytest.mark.parametrize("shape", [APART, ("--set", "cluster.jobset=false")])
def test_a_run_that_is_running_takes_another_shape(
    api: ApiServer, sh: Shell, path: str, shape: tuple[str, ...]
) -> None:
    """The JobSet's Jobs have the same names, and only the JobSet may change them."""
    sh("submit", path)
    assert "replace Job tiny-producer-0" in sh("submit", path, *shape, "--replace")
    there = api.the("Job", "tiny-producer-0")
    assert "ownerReferences" not in there["metadata"]
    assert len(api.pods("producer")) == 2


def test_jobs_without_jobset_are_resized_alone_too(api: ApiServer, sh: Shell, path: str) -> None:
    plain = ("--set", "cluster.jobset=false")
    sh("submit", path, *plain)
    before = others(api)
    sh("submit", path, *plain, "--set", "processes.producers=3", "--replace")
    assert others(api) == before
    assert len(api.pods("producer")) == 3


@pytest.mark.system
def test_run_with_producers_apart_fails_ends_and_comes_back_whole(
    api: ApiServer, sh: Shell, path: str
) -> None:
    sh("submit", path, *APART)
    api.condition("Job", "tiny-producer-0", "Failed", "exit 2")
    assert json.loads(sh("status", path, *APART, "--json"))["state"] == "failed"
    more = sh.fail("submit", path, *APART, "--set", "processes.producers=3")
    assert "its pods save and exit, and new ones continue" in more  # all that remains of the run
    failed = api.pods("producer")
    assert "has failed (exit 2)" in sh("resume", path, *APART)
    assert not {*failed} & {*api.pods("producer")}
    api.condition("JobSet", "tiny", "Completed")
    assert json.loads(sh("status", path, *APART, "--json"))["state"] == "running"
    api.condition("Job", "tiny-producer-0", "Complete")
    assert json.loads(sh("status", path, *APART, "--json"))["state"] == "complete"
    sh("cancel", path, *APART)
    assert not api.objects


IN_PART = (*APART, "--set", "cluster.queue=gpus", "--set", "cluster.producer.least=1")


@pytest.mark.system
def test_producers_that_kueue_admitted_in_part_are_left_so_or_replaced(
    api: ApiServer, sh: Shell, path: str
) -> None:
    """Kueue reduced the Job's parallelism, and rejects changes of it by anyone else."""
    job = "tiny-producer-0"
    more = ("submit", path, *IN_PART, "--set", "processes.producers=5")
    sh(*more)
    api.edit("Job", job, "kueue", {"spec": {"parallelism": 3}})
    assert "nothing to change" in sh(*more)
    cpus = (*more, "--set", "cluster.producer.cpus=7")
    assert "only its producers change" in sh.fail(*cpus)
    before = others(api)
    most = ("submit", path, *IN_PART, "--set", "processes.producers=6")
    assert f"replace Job {job}" in sh(*most, "--replace")
    assert others(api) == before
    spec = api.the("Job", job)["spec"]
    assert (spec["parallelism"], spec["completions"]) == (6, 6)
    api.edit("Job", job, "kueue", {"spec": {"parallelism": 3}})
    sh("submit", path, *APART, "--set", "cluster.queue=gpus", "--replace")
    assert api.the("Job", job)["spec"]["parallelism"] == 2


def attempt(api: ApiServer) -> str:
    name: str = api.the("ConfigMap", "tiny")["data"]["attempt"]
    return name


@pytest.mark.system
def test_each_attempt_has_a_name_of_its_own(api: ApiServer, sh: Shell, path: str) -> None:
    """A failure that one attempt recorded does not end the next attempt (`storage/failure.py`)."""
    sh("submit", path, *APART)
    first = attempt(api)
    assert "nothing to change" in sh("submit", path, *APART)
    sh("submit", path, *APART, "--set", "processes.producers=3", "--replace")
    assert attempt(api) == first  # its trainers are unchanged
    sh("submit", path, *APART, "--set", "cluster.trainer.cpus=7", "--replace")
    second = attempt(api)
    api.condition("JobSet", "tiny", "Failed", "exit 2")
    sh("resume", path, *APART, "--set", "cluster.trainer.cpus=7")
    assert len({first, second, attempt(api)}) == 3
    for pod in api.names("Pod"):
        for container in api.the("Pod", pod)["spec"]["containers"]:
            (told,) = (each for each in container["env"] if each["name"] == ATTEMPT)
            key = told["valueFrom"]["configMapKeyRef"]
            assert (key["name"], key["key"], key["optional"]) == ("tiny", "attempt", True)
    sh("cancel", path, *APART)
    sh("submit", path)  # a JobSet ends all of its parts, so no attempt is recorded
    assert "attempt" not in api.the("ConfigMap", "tiny")["data"]


@pytest.mark.system
def test_gpus_that_would_wait_for_the_plan_are_warned_of(
    api: ApiServer, sh: Shell, path: str
) -> None:
    gpus = ("--set", "cluster.producer.gpus=1")
    assert "no plan yet" not in sh.warned("submit", path, *gpus)
    sh("cancel", path)
    assert "there is no plan yet: producers will occupy 2 GPUs" in sh.warned(
        "submit", path, *APART, *gpus
    )
    sh("cancel", path)
    sh("plan", path)
    assert "no plan yet" not in sh.warned("submit", path, *APART, *gpus)


# under Kueue, with the queue and the priorities of k8s/overlays/gpu-spot


@cache
def overlay() -> tuple[Object, ...]:
    return tuple(kustomized("overlays/gpu-spot"))


def queue(**quotas: str) -> Queue:
    """Return the queue with other GPU quotas per flavor."""
    objects = []
    for obj in overlay():
        for number, flavor in enumerate(("gpus", "spot")):
            if obj["kind"] == "ClusterQueue" and flavor in quotas:
                where = ("spec", "resourceGroups", 0, "flavors", number, "resources", 3)
                obj = changed(obj, quotas[flavor], *where, "nominalQuota")  # noqa: PLW2901
        objects.append(obj)
    return Queue(objects)


def large(*overrides: str, apart: bool = True) -> list[Object]:
    settings = ["processes.producers=1000", f"cluster.producer.apart={str(apart).lower()}"]
    return render_objects(load_run(LARGE, [*settings, *overrides]))


def kinds(kueue: Queue) -> list[str]:
    """Return the kinds of the admitted objects: the trainers' JobSet, the producers' Job."""
    return [name.partition(" ")[0] for name in kueue.admitted()]


def test_trainers_do_not_wait_for_room_for_producers() -> None:
    kueue = queue(spot="600")
    kueue.apply(*large(apart=False))
    assert kueue.admitted() == []
    kueue = queue(spot="600")
    kueue.apply(*large())
    assert kinds(kueue) == ["JobSet"]
    kueue.apply(*large("processes.producers=500"))
    assert kinds(kueue) == ["JobSet", "Job"]


def test_producers_are_preempted_without_their_trainers() -> None:
    """If both are on the same nodes, another run's trainers replace the producers."""
    here = ("cluster.producer.node_selector={}", "processes.producers=8")
    for apart in (True, False):
        # 16 + 1 + 8 for one run, and 16 for the other, whose reporter lacks a GPU
        kueue = queue(gpus="41")
        kueue.apply(*large(*here, apart=apart))
        kueue.apply(*large("name=urgent", "processes.producers=1", apart=apart))
        assert kinds(kueue) == (["JobSet", "JobSet", "Job"] if apart else ["JobSet"])
        assert ("Job urgent-producer-0" in kueue.admitted()) == apart


@pytest.mark.parametrize("left_out", [(), ("cluster.reporter=null", "index.workers=0")])
def test_a_run_with_parts_after_training_is_not_ready_before(left_out: tuple[str, ...]) -> None:
    """So `waitForPodsReady` must be off, unless no part follows the training."""
    (jobset,) = (obj for obj in large(*left_out) if obj["kind"] == "JobSet")
    controller = JobSet(jobset, lambda manifest: Job(manifest, lambda _: pytest.fail("no pods")))
    controller.reconcile()
    (planner,) = controller.jobs["planner"]
    planner.condition = Condition("Complete", "CompletionsReached")
    controller.reconcile()
    states = {
        name: [job.condition is None for job in jobs] for name, jobs in controller.jobs.items()
    }
    assert states == {"planner": [False], "trainer": [True]}
    parts = [
        (1, states.get(part["name"], []).count(True), states.get(part["name"], []).count(False))
        for part in jobset["spec"]["replicatedJobs"]
    ]
    assert is_ready(parts) == bool(left_out)


def test_resizing_producers_leaves_the_trainers_workload_alone() -> None:
    kueue = queue()
    kueue.apply(*large())
    assert kueue.made == 2
    kueue.apply(*large("processes.producers=1050"))
    assert kueue.made == 3  # only the producers' workload is created again
    assert kinds(kueue) == ["JobSet", "Job"]
    kueue.apply(*large("processes.producers=2000"))  # more than the quota: they wait
    assert kinds(kueue) == ["JobSet"]


def test_producers_are_admitted_in_part_if_the_run_file_says_so() -> None:
    """Another run's trainers still replace the producers."""
    indexing = ("index.workers=100",)
    kueue = queue(spot="600")
    kueue.apply(*large(*indexing, "cluster.producer.least=501"))
    assert kinds(kueue) == ["JobSet"]
    kueue = queue(spot="600")
    kueue.apply(*large(*indexing, "cluster.producer.least=1"))
    assert (kinds(kueue), kueue.pods_of("Job")) == (["JobSet", "Job"], 500)
    here = (
        "cluster.producer.node_selector={}",
        "processes.producers=8",
        "cluster.producer.least=1",
    )
    kueue = queue(gpus="41")
    kueue.apply(*large(*here))
    kueue.apply(*large("name=urgent", *here))
    assert kinds(kueue) == ["JobSet", "Job", "JobSet"]
    assert kueue.pods_of("Job") == 7


def test_elastic_producers_are_resized_without_a_restart() -> None:
    kueue = queue()
    kueue.apply(*large("cluster.producer.elastic=true"))
    kueue.apply(*large("cluster.producer.elastic=true", "processes.producers=1050"))
    assert (kinds(kueue), kueue.pods_of("Job")) == (["JobSet", "Job"], 1050)
    kueue.apply(*large("cluster.producer.elastic=true", "processes.producers=2000"))
    # the other producers wait
    assert (kinds(kueue), kueue.pods_of("Job")) == (["JobSet", "Job"], 1050)
    assert kueue.restarts == 0
    kueue = queue()
    kueue.apply(*large())
    kueue.apply(*large("processes.producers=1050"))
    assert kueue.restarts == 1
