import copy
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from dist_sae.commands.cli import main
from dist_sae.config import Run, load_run, validate_run
from dist_sae.errors import ConfigError
from dist_sae.kubernetes.cluster import amount
from dist_sae.kubernetes.jobs import render_objects
from dist_sae.kubernetes.scheduling import requests_of
from tests.kubernetes.schemas import (
    VERSIONS,
    Object,
    check,
    check_custom,
    jobs_of,
    needs_definitions,
    security_faults,
    templates_of,
)

ROOT = Path(__file__).parents[2]
RUNS = sorted(
    path for path in (ROOT / "launch/runs").glob("*.yaml") if "image:" in path.read_text()
)
CLUSTER = ROOT / "launch/runs/synthetic-topk-cluster.yaml"
KUSTOMIZED = tuple(
    str(path.parent.relative_to(ROOT / "k8s"))
    for path in sorted((ROOT / "k8s").rglob("kustomization.yaml"))
)


def load(*overrides: str) -> Run:
    return load_run(CLUSTER, overrides)


def jobset_of(run: Run) -> Object:
    (jobset,) = (obj for obj in render_objects(run) if obj["kind"] == "JobSet")
    return jobset


def job_of(run: Run, part: str) -> Object:
    found: Object = next(
        job["spec"] for job in all_jobs_of(run) if f"-{part}-" in job["metadata"]["name"]
    )
    return found


def all_jobs_of(run: Run) -> list[Object]:
    """Return the Jobs of the JobSet, and the separate Jobs."""
    beside = [obj for obj in render_objects(run) if obj["kind"] == "Job"]
    return [*jobs_of(jobset_of(run)), *beside]


def pod_of(run: Run, part: str) -> Object:
    spec: Object = job_of(run, part)["template"]["spec"]
    return spec


def environment(container: Object) -> dict[str, Any]:
    return {item["name"]: item.get("value") for item in container["env"]}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_what_is_committed_is_what_render_gives(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["render", str(path), "--only", "kubernetes"]) == 0
    committed = (ROOT / "k8s/rendered" / path.name).read_text()
    assert committed.split("\n", 1)[1] == capsys.readouterr().out, "run launch/render.sh"


def test_every_rendered_file_has_its_run() -> None:
    rendered = {path.name for path in (ROOT / "k8s/rendered").iterdir()}
    assert rendered == {path.name for path in RUNS}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("jobset", ["true", "false"])
@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_objects_are_valid(path: Path, jobset: str, version: str) -> None:
    for obj in render_objects(load_run(path, [f"cluster.jobset={jobset}"])):
        check(obj, version)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_pods_fulfil_the_restricted_standard(path: Path) -> None:
    for obj in render_objects(load_run(path)):
        for template in templates_of(obj):
            assert not list(security_faults(template))


def changed(obj: Object, value: Any, *path: str | int) -> Object:
    inner = copied = copy.deepcopy(obj)
    for key in path[:-1]:
        inner = inner[key]  # type: ignore[index]
    inner[path[-1]] = value  # type: ignore[index]
    return copied


@needs_definitions
def test_definitions_catch_what_is_wrong() -> None:
    jobset = jobset_of(load())
    with pytest.raises(jsonschema.ValidationError, match="replcas"):
        check(changed(jobset, 1, "spec", "replicatedJobs", 0, "replcas"))
    with pytest.raises(AssertionError, match="mutually exclusive"):
        check(changed(jobset, {"startupPolicyOrder": "InOrder"}, "spec", "startupPolicy"))
    with pytest.raises(AssertionError, match="immutable"):
        check_custom(changed(jobset, 7, "spec", "failurePolicy", "maxRestarts"), jobset)
    (queue,) = (obj for obj in kustomized("overlays/gpu-spot") if obj["kind"] == "ClusterQueue")
    group = ("spec", "resourceGroups", 0)
    with pytest.raises(jsonschema.ValidationError, match="nominalQuotas"):
        check(changed(queue, "1", *group, "flavors", 0, "resources", 0, "nominalQuotas"))
    with pytest.raises(AssertionError, match=r"resourceGroups\[\]"):
        check(changed(queue, ["cpu"], *group, "coveredResources"))


def test_checks_catch_what_is_wrong() -> None:
    """The checks above reject objects that an API server would reject."""
    jobset = jobset_of(load())
    job = ("spec", "replicatedJobs", 0)
    with pytest.raises(kubernetes_validate.ValidationError, match="completons"):
        kubernetes_validate.validate(
            next(jobs_of(changed(jobset, 1, *job, "template", "spec", "completons"))),
            "1.37",
            strict=True,
        )
    container = (*job, "template", "spec", "template", "spec", "containers", 0)
    rooted = changed(jobset, None, *container, "securityContext", "readOnlyRootFilesystem")
    assert [list(security_faults(t)) for t in templates_of(rooted)] == [
        ["main may write its root"],
        *[[]] * 4,
    ]


@cache
def kustomized(folder: str) -> list[Object]:
    kubectl = Path(sys.executable).parent / "kubectl"
    built = subprocess.run(
        [kubectl, "kustomize", ROOT / "k8s" / folder], capture_output=True, text=True, check=True
    )
    return list(yaml.load_all(built.stdout, yaml.CSafeLoader))


@pytest.mark.parametrize("folder", KUSTOMIZED)
def test_kustomize_builds_valid_objects(folder: str) -> None:
    objects = kustomized(folder)
    assert {obj["kind"] for obj in objects} >= {"Namespace", "ServiceAccount", "NetworkPolicy"}
    for obj in objects:
        check(obj)
        for template in templates_of(obj):
            assert not list(security_faults(template))


def test_what_ends_a_pod_decides_what_follows() -> None:
    for part in ("planner", "producer", "trainer", "index", "reporter"):
        rules = job_of(load(), part)["podFailurePolicy"]["rules"]
        found = [(rule["action"], rule.get("onExitCodes", {}).get("values")) for rule in rules]
        counts_itself = part != "reporter"
        again = [1, 2, 126, 127] if counts_itself else [75, 143]
        assert found == [("FailJob", [2]), ("Ignore", None), ("Ignore", again)]
        assert rules[2]["onExitCodes"]["operator"] == ("NotIn" if counts_itself else "In")
        assert rules[1]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    (rule,) = jobset_of(load())["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet"


def test_trainers_meet_on_the_first_pod() -> None:
    run = load("processes.trainers=4", "cluster.trainer.ranks=2", "name=a.b")
    assert job_of(run, "trainer")["completions"] == 2
    main_container = pod_of(run, "trainer")["containers"][0]
    env = environment(main_container)
    assert env["WORLD_SIZE"] == "4"
    assert env["MASTER_ADDR"] == "a-b-trainer-0-0.a-b"
    assert main_container["args"] == ["train", "/etc/dist-sae/run.yaml", "--local-ranks", "2"]


def test_parts_follow_one_another() -> None:
    replicated = jobset_of(load())["spec"]["replicatedJobs"]
    order = {job["name"]: [d["name"] for d in job.get("dependsOn", [])] for job in replicated}
    assert order == {
        "planner": [],
        "producer": ["planner"],
        "trainer": ["planner"],
        "index": ["trainer"],
        "reporter": ["index"],
    }
    assert all(job["args"][-1] != "--wait" for job in pod_of(load(), "producer")["containers"])


def test_parts_wait_by_themselves_where_there_is_no_jobset() -> None:
    objects = render_objects(load("cluster.jobset=false"))
    assert [obj["kind"] for obj in objects] == [
        "ConfigMap",
        "NetworkPolicy",
        "Service",
        *["Job"] * 5,
    ]
    arguments = {
        (obj["metadata"]["name"].split("-")[-2], container["args"][0]): container["args"]
        for obj in objects
        if obj["kind"] == "Job"
        for container in [
            *obj["spec"]["template"]["spec"].get("initContainers", []),
            *obj["spec"]["template"]["spec"]["containers"],
        ]
    }
    waiting = {key for key, args in arguments.items() if "--wait" in args}
    assert waiting == {
        ("producer", "produce"),
        ("trainer", "train"),
        ("index", "index"),
        ("reporter", "evaluate"),
    }
    service = objects[2]
    trainer = next(obj for obj in objects if "-trainer-0" in obj["metadata"]["name"])
    labels = trainer["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert trainer["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]


def test_reporter_leaves_the_export_of_routed_dictionaries_out() -> None:
    def programs(run: Run) -> list[str]:
        pod = pod_of(run, "reporter")
        return [c["args"][0] for c in [*pod["initContainers"], *pod["containers"]]]

    assert programs(load()) == ["evaluate", "export", "report"]
    routed = load("sae={kind: routed, n_latents: 256, k: 4, auxk: 8, experts: 4}")
    assert programs(routed) == ["evaluate", "report"]
    alone = jobset_of(load("cluster.reporter=null"))["spec"]["replicatedJobs"]
    assert [job["name"] for job in alone] == ["planner", "trainer", "producer", "index"]


def test_a_pod_of_the_index_is_one_worker() -> None:
    run = load("index.workers=3", "index.latent_shards=2", "cluster.index.cpus=8")
    assert job_of(run, "index")["completions"] == 3
    (container,) = pod_of(run, "index")["containers"]
    assert container["args"] == (
        ["index", "/etc/dist-sae/run.yaml", "--local-ranks", "2", "--worker", "$(POD_NAME)"]
    )
    assert environment(container)["OMP_NUM_THREADS"] == "4"
    assert container["ports"][0]["name"] == "metrics"


def test_a_pod_with_gpus_does_not_go_without() -> None:
    """A broken driver ends the program with 2, and so ends the run.

    Falling back to CPUs would take months.
    """
    needed = ["--set", "processes.device=cuda"]
    for part in ("trainer", "producer", "index"):
        for gpus in (0, 1):
            (container,) = pod_of(load(f"cluster.{part}.gpus={gpus}"), part)["containers"]
            assert (container["args"][-2:] == needed) == bool(gpus)
    pod = pod_of(load("cluster.reporter.gpus=1"), "reporter")
    assert pod["initContainers"][0]["args"][-2:] == needed
    for other in (*pod["initContainers"][1:], *pod["containers"]):
        assert len(other["args"]) == 2


MODEL = "model.tensor_parallel=2", "cluster.producer.gpus=2"


@pytest.mark.parametrize(
    ("overrides", "ranks"),
    [
        ((), 1),
        (("cluster.reporter.gpus=4",), 4),  # each rank has its share of the latents
        (("cluster.reporter.gpus=3",), 1),  # 3 does not divide 1,048,576 latents
        ((*MODEL, "cluster.reporter.gpus=0"), 2),
        ((*MODEL, "cluster.reporter.gpus=2"), 2),
        ((*MODEL, "cluster.reporter.gpus=1"), 1),  # two ranks cannot share one GPU
    ],
)
def test_the_reporter_evaluates_by_the_ranks_of_the_model_or_of_its_gpus(
    overrides: tuple[str, ...], ranks: int
) -> None:
    path = ROOT / "launch/runs/llama3.1-8b-resid16-batchtopk-1m-16xh100.yaml"
    pod = pod_of(load_run(path, [*overrides, "cluster.reporter.cpus=8"]), "reporter")
    containers: list[Any] = [*pod["initContainers"], *pod["containers"]]
    evaluate, export, report = containers
    together = ["--local-ranks", str(ranks)] if ranks > 1 else []
    assert evaluate["args"][:2] == ["evaluate", "/etc/dist-sae/run.yaml"]
    assert evaluate["args"][2 : 2 + len(together)] == together
    assert environment(evaluate)["OMP_NUM_THREADS"] == str(8 // ranks)
    for other in (export, report):
        assert len(other["args"]) == 2
        assert environment(other)["OMP_NUM_THREADS"] == "8"


def test_a_run_without_index_has_no_pods_for_it() -> None:
    jobs = jobset_of(load("index.workers=0"))["spec"]["replicatedJobs"]
    after = {job["name"]: job.get("dependsOn") for job in jobs}
    assert "index" not in after
    assert after["reporter"] == [{"name": "trainer", "status": "Complete"}]


def test_pods_ask_for_what_the_run_file_says() -> None:
    run = load_run(ROOT / "launch/runs/llama3.1-8b-resid16-batchtopk-1m-16xh100.yaml")
    trainer, producer = pod_of(run, "trainer"), pod_of(run, "producer")
    limits = trainer["containers"][0]["resources"]["limits"]
    assert limits == {"memory": "1000Gi", "nvidia.com/gpu": "8", "rdma/hca": "8"}
    assert trainer["terminationGracePeriodSeconds"] == 900
    assert trainer["priorityClassName"] == "dist-sae-trainer"
    (term,) = trainer["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "topology.kubernetes.io/zone"
    own = job_of(run, "trainer")["template"]["metadata"]["labels"]
    # otherwise the first pod would wait for itself
    assert term["labelSelector"]["matchLabels"].items() <= own.items()
    for spread in (producer, pod_of(run, "index")):
        assert spread["nodeSelector"] == {"dist-sae/pool": "spot"}
        assert {"key": "dist-sae/spot", "operator": "Exists"} in spread["tolerations"]
        assert spread["topologySpreadConstraints"][0]["topologyKey"] == "kubernetes.io/hostname"
        assert spread["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert producer["containers"][0]["envFrom"] == [{"secretRef": {"name": "hub-token"}}]
    assert environment(trainer["containers"][0])["OMP_NUM_THREADS"] == "12"  # 96 cores, 8 ranks
    assert jobset_of(run)["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert "DIST_SAE_RDMA" in environment(trainer["containers"][0])
    without = pod_of(load(), "trainer")["containers"][0]
    assert "DIST_SAE_RDMA" not in environment(without)


def test_all_that_a_pod_writes_has_the_limit_that_the_run_file_states() -> None:
    parts = ("planner", "producer", "trainer", "index", "reporter")
    run = load(*(f"cluster.{part}.scratch={n}Gi" for n, part in enumerate(parts, start=1)))
    for n, part in enumerate(parts, start=1):
        pod, limit = pod_of(run, part), f"{n}Gi"
        disks = {v["name"]: v["emptyDir"] for v in pod["volumes"] if "emptyDir" in v}
        assert disks == {"scratch": {"sizeLimit": limit}, "shm": {"medium": "Memory"}}
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            places = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert places["/tmp"] == places["/scratch"] == "scratch"
            assert container["resources"]["requests"]["ephemeral-storage"] == limit


@pytest.mark.parametrize(
    ("volume", "keeps"),
    [
        ("{persistentVolumeClaim: {claimName: models}}", True),
        ("{hostPath: {path: /var/cache/models}}", True),
        ("{image: {reference: 'registry/models:1'}}", False),  # read-only: it contains model.path
    ],
)
def test_model_files_stay_in_the_volume_that_the_run_file_names(
    volume: str, *, keeps: bool
) -> None:
    run = load(f"cluster.cache={volume}")
    for part in ("planner", "producer", "trainer", "index", "reporter"):
        pod = pod_of(run, part)
        assert pod["volumes"][-1] == {"name": "cache", **yaml.safe_load(volume)}
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            assert container["volumeMounts"][-1] == {"name": "cache", "mountPath": "/cache"}
            assert environment(container).get("HF_HOME") == ("/cache" if keeps else None)
    for obj in render_objects(run):
        check(obj)
    faults = [
        fault
        for obj in render_objects(run)
        for t in templates_of(obj)
        for fault in security_faults(t)
    ]
    assert bool(faults) == ("Claim" not in volume)
    assert "HF_HOME" not in environment(pod_of(load(), "producer")["containers"][0])


LARGE = (  # 16 x 8 GPUs train, and 1,000 spot GPUs run the model
    "processes.trainers=128",
    "activations.streams=128",
    "processes.producers=1000",
)


def test_the_quotas_admit_the_large_run() -> None:
    run = load_run(ROOT / "launch/runs/llama3.1-8b-resid16-batchtopk-1m-16xh100.yaml", LARGE)
    objects = {obj["kind"]: obj for obj in kustomized("overlays/gpu-spot")}
    (group,) = objects["ClusterQueue"]["spec"]["resourceGroups"]
    room = {
        (flavor["name"], resource["name"]): amount(resource["nominalQuota"])
        for flavor in group["flavors"]
        for resource in flavor["resources"]
    }
    hard = objects["ResourceQuota"]["spec"]["hard"]
    pods, gpus = amount(hard["pods"]), amount(hard["requests.nvidia.com/gpu"])
    for job in all_jobs_of(run):
        number, pod = job["spec"]["completions"], job["spec"]["template"]["spec"]
        # Kueue puts a pod set into the first flavor whose labels match its node selector
        flavor = pod.get("nodeSelector", {}).get("dist-sae/pool", "gpus")
        needed = requests_of(pod)
        assert needed.keys() <= set(group["coveredResources"])
        pods -= number
        gpus -= number * amount(needed.get("nvidia.com/gpu", 0))
        for name, quantity in needed.items():
            room[flavor, name] -= number * amount(quantity)
    assert min(pods, gpus, *room.values()) >= 0, room


def test_pods_serve_metrics_where_the_run_names_no_port() -> None:
    configuration = render_objects(load())[0]
    served = validate_run(yaml.safe_load(configuration["data"]["run.yaml"]), "run.yaml")
    (port,) = pod_of(load(), "trainer")["containers"][0]["ports"]
    assert (port["name"], port["containerPort"]) == ("metrics", 9400)
    assert served.telemetry.port == 9400
    monitor = yaml.safe_load((ROOT / "k8s/base/pod-monitor.yaml").read_text())
    labels = job_of(load(), "trainer")["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert monitor["spec"]["podMetricsEndpoints"][0]["port"] == port["name"]


APART, QUEUED = ["cluster.producer.apart=true"], ["cluster.queue=gpus", "processes.producers=2"]


@pytest.mark.parametrize(
    ("overrides", "problems"),
    [
        (["cluster.image=null"], ["cluster.image: missing"]),
        (
            ["store.runs=/data/runs", "store.activations=/data/a"],
            ["store.activations: /data/a is a local folder", "store.runs: /data/runs is"],
        ),
        (["name=1st"], ["name: 1st is not valid in names of pods"]),
        (["name=" + "n" * 43], ["name: nnn"]),
        (["name=" + "n" * 38], ["name: nnn"]),
        (["cluster.producer.queue=spot"], ["cluster.producer.queue: producers in the JobSet are"]),
        (
            [*APART, "cluster.producer.elastic=true"],
            ["cluster.producer.elastic: has no effect without a queue; set cluster.queue"],
        ),
        (
            [*APART, *QUEUED, "cluster.producer.elastic=true", "cluster.producer.least=1"],
            ["cluster.producer.elastic: Kueue does not allow it together with least"],
        ),
        (
            [*APART, *QUEUED, "cluster.producer.least=2"],
            ["cluster.producer.least: 2 must be less than processes.producers 2"],
        ),
    ],
)
def test_run_that_cannot_be_on_a_cluster_is_refused(
    overrides: list[str], problems: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        render_objects(load(*overrides))
    lines = str(refused.value).splitlines()
    assert len(lines) == len(problems)
    assert all(line.startswith(problem) for line, problem in zip(lines, problems, strict=True))


def test_longest_name_is_a_hosts_name_in_a_trial_too() -> None:
    """63 characters = 37 + the 26 of `-new-producer-0-0000-abcde`."""
    run = load("name=" + "n" * 37)
    assert jobset_of(run)["metadata"]["name"] == run.name


def test_relative_paths_mean_nothing_to_pods() -> None:
    data = yaml.safe_load((ROOT / "launch/runs/smollm2-resid7-topk-cpu.yaml").read_text())
    data["store"] = {"activations": "s3://b/a", "runs": "s3://b/r"}
    data["cluster"] = {"image": "example.org/x:1"}
    data["model"]["path"] = "./smollm2"
    with pytest.raises(ConfigError) as refused:
        render_objects(validate_run(data, "run.yaml"))
    assert [line.split(":")[0] for line in str(refused.value).splitlines()] == [
        "corpus.files",
        "model.path",
    ]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("cluster.trainer.ranks=3", "cluster.trainer.ranks: 3 does not divide processes.trainers"),
        ("cluster.trainer.gpus=2", "cluster.trainer.gpus: 2 for 1 ranks in a pod"),
        ("cluster.producer.gpus=4", "cluster.producer.gpus: 4 for 1 ranks in a pod"),
        ("cluster.index.gpus=4", "cluster.index.gpus: 4 for 1 ranks in a pod"),
        (
            "cluster.trainer.memory=16gb",
            "cluster.trainer.memory: write a number and a unit, such as 16Gi",
        ),
        ("cluster.image=Bad Image", "cluster.image: write it as registry/name:tag or"),
        ("cluster.trainr={}", "cluster.trainr: unknown key; did you mean trainer?"),
    ],
)
def test_mistakes_about_the_cluster_are_told(override: str, problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(override)
    assert problem in str(refused.value)
