"""The pods of a run: Run -> pod templates. Pure.

    planner     reads the corpus once
    producer    each pod is one producer, with all of its `model.tensor_parallel` ranks
    trainer     each pod has `cluster.trainer.ranks` ranks; pod 0 hosts the rendezvous
    index       each pod is one worker, with all of its `index.latent_shards` ranks
    reporter    runs evaluate (on several ranks if needed), export and report, one after the other

Pods meet the restricted pod security standard, unless `pod_patch` changes that: no root, no
privileges, a read-only root file system. Caches and temporary files go to /scratch, which has a
size limit and is deleted with the pod. Model files can be in a persistent volume (`cluster.cache`).
"""

from typing import Any, Literal, get_args

from dist_sae.config import Run, jobs_of
from dist_sae.config.cluster import PodsConfig, SpreadPods, TrainerPods
from dist_sae.distributed import transport
from dist_sae.distributed.local_ranks import NODE
from dist_sae.interop import sae_lens
from dist_sae.kubernetes.names import labels, object_name, selector
from dist_sae.kubernetes.patch import merge_patch
from dist_sae.storage.failure import ATTEMPT, POD
from dist_sae.storage.lives import JOB
from dist_sae.storage.lives import Part as LivingPart

Part = Literal["planner", "trainer", "producer", "index", "reporter"]
"""The parts in the order of the JobSet. Kueue takes the priority of the first that has one."""
Object = dict[str, Any]

RUN_FILE = "/etc/dist-sae/run.yaml"
ATTEMPT_KEY = "attempt"
"""Key of the attempt's name in the ConfigMap. `submit` writes it."""
SCRATCH = "/scratch"
CACHE = "/cache"
METRICS = "metrics"
"""Name of the port that Prometheus scrapes."""
_GPU_PROGRAMS = ("produce", "train", "index", "evaluate")
"""Programs that use their pods' GPUs. In a plain Job, they wait for the preceding part."""
USER_ID = 10001
"""Id of the user that the image creates."""

_START_SECONDS = 600  # importing torch from a freshly pulled image is slow
_LIVE_SECONDS = 120  # of failed probes until a restart; `/livez` fails while a rank hangs


def n_pods(run: Run, part: Part) -> int:
    """Return a part's number of pods."""
    trainers = run.processes.trainers // run.cluster.trainer.ranks
    workers = {"producer": run.processes.producers, "index": run.index.workers}
    return (workers | {"trainer": trainers}).get(part, 1)


def has_own_job(run: Run, part: Part) -> bool:
    """Return whether the part is a plain Job instead of a Job of the JobSet."""
    return not run.cluster.jobset or (part == "producer" and run.cluster.producer.apart)


def n_ranks(run: Run, part: Part) -> int:
    """Return the number of ranks in each of a part's pods."""
    return {
        "producer": run.tensor_parallel,
        "trainer": run.cluster.trainer.ranks,
        "index": run.index.latent_shards,
        "reporter": _evaluation_ranks(run),
    }.get(part, 1)


def _evaluation_ranks(run: Run) -> int:
    """Return the number of ranks that evaluate: `model.tensor_parallel`, or else one per GPU.

    It is 1 if there are too few GPUs, or if the latents cannot be divided among the ranks.
    """
    gpus = run.cluster.reporter.gpus if run.cluster.reporter else 0
    ranks = run.tensor_parallel if run.tensor_parallel > 1 else max(1, gpus)
    too_few = 0 < gpus < ranks
    return 1 if too_few or not all(job.sae.can_shard_over(ranks) for job in jobs_of(run)) else ranks


def pods_of(run: Run, part: Part) -> PodsConfig:
    """Return the settings of a part's pods."""
    pods: PodsConfig | None = getattr(run.cluster, part)
    assert pods is not None
    return pods


def pod_template(run: Run, part: Part) -> Object:
    """Render the template of a part's pods."""
    pods, cluster = pods_of(run, part), run.cluster
    *initial, main = _containers(run, part)
    spec = {
        "serviceAccountName": cluster.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": pods.grace_seconds,
        "imagePullSecrets": [{"name": name} for name in cluster.pull_secrets],
        "priorityClassName": pods.priority_class,
        "nodeSelector": pods.node_selector,
        "tolerations": [without_empty(toleration.model_dump()) for toleration in pods.tolerations],
        "topologySpreadConstraints": _spread(run, part),
        "affinity": _affinity(run, part),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "initContainers": initial,
        "containers": [main],
        "volumes": [
            {"name": "run", "configMap": {"name": object_name(run)}},
            {"name": "scratch", "emptyDir": {"sizeLimit": pods.scratch}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
            *({"name": "cache", **volume} for volume in [cluster.cache] if volume),
        ],
    }
    own = {"labels": labels(run, part)}
    template = {"metadata": own, "spec": without_empty(spec)}
    patched: Object = merge_patch(template, pods.pod_patch, f"cluster.{part}.pod_patch")
    # a patch must not change these labels, because commands find the pods by them
    return patched | {"metadata": merge_patch(patched["metadata"], own, "metadata")}


def _containers(run: Run, part: Part) -> list[Object]:
    """Render a pod's containers in the order in which they run; all but the last as init ones."""
    match part:
        case "planner":
            return [_container(run, part, "main", ["plan", RUN_FILE])]
        case "producer" | "trainer" | "index":
            program = {"producer": "produce", "trainer": "train"}.get(part, part)
            named = [] if part == "trainer" else ["--worker", f"$({POD})"]
            arguments = [program, RUN_FILE, "--local-ranks", str(n_ranks(run, part)), *named]
            return [_with_probes(run, _container(run, part, "main", arguments))]
        case "reporter":
            export = [] if all(map(sae_lens.problem, jobs_of(run))) else ["export"]
            programs = ["evaluate", *export, "report"]
            ranks = n_ranks(run, part)
            together = {"evaluate": ["--local-ranks", str(ranks)]} if ranks > 1 else {}
            return [
                _container(run, part, name, [program, RUN_FILE, *together.get(program, [])])
                for program, name in zip(programs, [*programs[:-1], "main"], strict=True)
            ]


def _container(run: Run, part: Part, name: str, arguments: list[str]) -> Object:
    pods, cluster = pods_of(run, part), run.cluster
    if pods.gpus and arguments[0] in _GPU_PROGRAMS:
        arguments = [*arguments, "--set", "processes.device=cuda"]
    waits = has_own_job(run, part) and arguments[0] in _GPU_PROGRAMS
    devices = {pods.gpu_resource: pods.gpus}
    if isinstance(pods, TrainerPods):
        devices[pods.rdma_resource] = pods.rdma
    limits = {"memory": pods.memory} | {name: str(n) for name, n in devices.items() if n}
    container = {
        "name": name,
        "image": cluster.image,
        "imagePullPolicy": cluster.pull_policy,
        "args": [*arguments, "--wait"] if waits else arguments,
        "env": _environment(run, part, n_ranks(run, part) if "--local-ranks" in arguments else 1),
        "envFrom": [{"configMapRef": {"name": name}} for name in cluster.config_maps]
        + [{"secretRef": {"name": name}} for name in cluster.secrets],
        "resources": {
            "requests": {"cpu": f"{pods.cpus:g}", "ephemeral-storage": pods.scratch} | limits,
            "limits": limits,
        },
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "run", "mountPath": RUN_FILE.rpartition("/")[0], "readOnly": True},
            {"name": "scratch", "mountPath": SCRATCH},
            {"name": "scratch", "mountPath": "/tmp", "subPath": "tmp"},  # shares /scratch's limit
            {"name": "shm", "mountPath": "/dev/shm"},
            *[{"name": "cache", "mountPath": CACHE}][: cluster.cache is not None],
        ],
    }
    return without_empty(container)


def _with_probes(run: Run, container: Object) -> Object:
    """Add the metrics port and the probes `/livez` and `/readyz` to a container."""
    port = run.telemetry.port or run.cluster.port

    def probe(path: str, every: int, limit: int) -> Object:
        return {
            "httpGet": {"path": path, "port": METRICS},
            "periodSeconds": every,
            "timeoutSeconds": 10,
            "failureThreshold": limit // every,
        }

    return container | {
        "ports": [{"name": METRICS, "containerPort": port}],
        "startupProbe": probe("/livez", 5, _START_SECONDS),
        "livenessProbe": probe("/livez", 20, _LIVE_SECONDS),
        "readinessProbe": probe("/readyz", 10, 30),
    }


def _environment(run: Run, part: Part, ranks: int) -> list[Object]:
    pods, processes = pods_of(run, part), run.processes
    values = {
        "HOME": f"{SCRATCH}/home",  # caches of compiled kernels, and of model files
        "OMP_NUM_THREADS": str(processes.threads or max(1, int(pods.cpus) // ranks)),
    }
    if run.cluster.cache and "image" not in run.cluster.cache:  # image volumes are read-only
        values["HF_HOME"] = CACHE
    if part == "trainer":
        values |= {
            "WORLD_SIZE": str(processes.trainers),
            "MASTER_ADDR": f"{object_name(run)}-trainer-0-0.{object_name(run)}",
            "MASTER_PORT": str(run.cluster.rendezvous_port),
        }
    if isinstance(pods, TrainerPods) and pods.rdma:
        values |= transport.pod_environment(SCRATCH)
    own = {POD: "metadata.name", NODE: "spec.nodeName"}
    if part in get_args(LivingPart):
        own[JOB] = "metadata.labels['batch.kubernetes.io/controller-uid']"
    known: list[Object] = [
        {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in own.items()
    ]
    if has_own_job(run, "producer"):  # no controller ends the other parts when one fails
        key = {"name": object_name(run), "key": ATTEMPT_KEY, "optional": True}
        known.append({"name": ATTEMPT, "valueFrom": {"configMapKeyRef": key}})
    return [*known, *({"name": k, "value": v} for k, v in (values | run.cluster.env).items())]


def _spread(run: Run, part: Part) -> list[Object]:
    pods = pods_of(run, part)
    if not isinstance(pods, SpreadPods) or not pods.spread_over:
        return []
    return [
        {
            "maxSkew": 1,
            "topologyKey": pods.spread_over,
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": selector(run, part)},
        }
    ]


def _affinity(run: Run, part: Part) -> Object | None:
    pods = pods_of(run, part)
    if not isinstance(pods, TrainerPods) or not pods.close_by:
        return None
    term = {"topologyKey": pods.close_by, "labelSelector": {"matchLabels": selector(run, part)}}
    return {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}


def without_empty(mapping: Object) -> Object:
    """Return a mapping without its empty values. Kubernetes gives absent keys their defaults."""
    return {key: value for key, value in mapping.items() if value not in (None, "", [], {})}
