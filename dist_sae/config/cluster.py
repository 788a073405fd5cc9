"""Settings of a run on Kubernetes. A local run ignores them."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from dist_sae.config.base import Section, Shape

_ENDS = "and start and end with a letter or a digit"
Quantity = Annotated[
    str,
    Shape(
        r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$",
        "write a number and a unit, such as 16Gi",
    ),
]
"""An amount of memory or disk in Kubernetes' notation, such as 16Gi."""
DnsLabel = Annotated[
    str,
    Shape(
        r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$",
        f"use at most 63 lower-case letters, digits and '-', {_ENDS}",
    ),
]
Name = Annotated[
    str,
    Shape(
        r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$",
        f"use at most 253 lower-case letters, digits, '-' and '.', {_ENDS}",
    ),
]
LabelKey = Annotated[
    str,
    Shape(
        r"^([a-z0-9][a-z0-9.-]*/)?[A-Za-z0-9][\w.-]{0,62}$",
        "write it as Kubernetes does: name or domain/name, such as nvidia.com/gpu",
    ),
]
Image = Annotated[
    str,
    Shape(r"^[a-z0-9][\w./:@-]*$", "write it as registry/name:tag or registry/name@sha256:..."),
]


def kubernetes_name(name: str) -> str:
    """Return a run's name without dots, which Kubernetes does not allow in host names."""
    return name.replace(".", "-")


VolumeKind = Literal["csi", "ephemeral", "hostPath", "image", "nfs", "persistentVolumeClaim"]
TemplateKey = Annotated[
    str,
    Shape(
        r"^(metadata|spec)$", "use metadata or spec, which contain all other keys of a pod template"
    ),
]


class Toleration(Section):
    """A taint that pods tolerate, written as in Kubernetes."""

    key: str | None = None
    """Key of the taint. null with `Exists` tolerates every taint."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """`Exists` ignores the taint's value; `Equal` compares it."""
    value: str | None = None
    """Value of the taint, used with `Equal`."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint. null tolerates all effects."""


class PodsConfig(Section):
    """Resources and placement of the pods of one part of a run, such as its producers."""

    cpus: PositiveFloat = 4.0
    """CPU cores that a pod requests."""
    memory: Quantity = "16Gi"
    """Memory request and limit of a pod. A pod that exceeds it is killed; other pods are not."""
    gpus: NonNegativeInt = 0
    """GPUs per pod."""
    gpu_resource: LabelKey = "nvidia.com/gpu"
    """Kubernetes resource name of the GPUs."""
    scratch: Quantity = "20Gi"
    """Space on the node's disk for caches and temporary files (/tmp). Its content is lost when the
    pod ends, and a pod that uses more is evicted. The planner needs room for the whole uncompressed
    text."""
    node_selector: dict[LabelKey, str] = Field(default_factory=dict)
    """Labels that a node must have to run these pods."""
    tolerations: tuple[Toleration, ...] = ()
    """Taints that pods tolerate."""
    priority_class: Name | None = None
    """PriorityClass of the pods. null: the cluster's default."""
    grace_seconds: PositiveInt = 60
    """Seconds between SIGTERM and SIGKILL."""
    retries: NonNegativeInt = 6
    """How many times in a row a pod is restarted without progress before the run fails. A new
    checkpoint (trainer), a unit (producer), or a unit or bucket (index) is progress and resets the
    count. Preemptions count too, except for the planner and the reporter, where only crashes count;
    the reporter's count is never reset. Exit code 2 fails the run at once."""
    pod_patch: dict[TemplateKey, dict[str, Any]] = Field(default_factory=dict)
    """Patch for the pod template, applied as a strategic merge, as `kubectl patch` does by default.
    Use it for annotations, a runtimeClassName, volumes, huge pages, IPC_LOCK or hostNetwork. The
    program's container is named `main`."""


class SpreadPods(PodsConfig):
    """Pods that work independently of each other."""

    spread_over: LabelKey | None = "kubernetes.io/hostname"
    """Node label, such as the host or the zone, over which pods are spread where possible."""


class ProducerPods(SpreadPods):
    """Producer pods. Each runs one producer, with all its `model.tensor_parallel` ranks."""

    apart: bool = False
    """true: producers get their own Job outside the JobSet. Kueue then admits and preempts them
    independently of the trainers, and `submit --replace` resizes them without touching the
    trainers. Their pods start at once and occupy their GPUs while they wait for the plan, so run
    `dist-sae plan` first. false: producers are part of the JobSet."""
    queue: DnsLabel | None = None
    """Kueue LocalQueue for producers with `apart: true`. null: `cluster.queue`."""
    least: PositiveInt | None = None
    """Least number of producers that Kueue may admit if there is no room for all (partial
    admission). Kueue does not add the others later. Needs `apart: true`. null: all or none."""
    elastic: bool = False
    """Let Kueue add or remove producers without restarting the others (elastic Jobs, on by default
    from Kueue 0.18). Needs `apart: true`. Cannot be combined with `least`."""


class IndexPods(SpreadPods):
    """Pods of the latent index. Each runs one worker with all its `index.latent_shards` ranks."""


class TrainerPods(PodsConfig):
    """Trainer pods. Each runs `ranks` of the `processes.trainers` ranks."""

    ranks: PositiveInt = 1
    """Ranks per pod. If the pod has GPUs, each rank has its own."""
    grace_seconds: PositiveInt = 600
    """Seconds between SIGTERM and SIGKILL. Must exceed the time of two steps and a checkpoint.
    `dist-sae status` warns if the last checkpoint took over half of it."""
    rdma: NonNegativeInt = 0
    """RDMA devices per pod. If above 0 and NCCL uses sockets, trainers stop with exit code 2."""
    rdma_resource: LabelKey = "rdma/hca"
    """Kubernetes resource name of the RDMA devices."""
    close_by: LabelKey | None = None
    """Node label, such as topology.kubernetes.io/zone, that must have the same value for all
    trainer pods. The pods wait until there is room for them."""


class ClusterConfig(Section):
    """Settings of a run on Kubernetes (`dist-sae submit`)."""

    image: Image | None = None
    """Container image built from `launch/Dockerfile`, by digest or tag. `submit` requires it."""
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """Kubernetes' imagePullPolicy."""
    pull_secrets: tuple[Name, ...] = ()
    """Names of the imagePullSecrets."""
    namespace: DnsLabel = "dist-sae"
    """Namespace of all of the run's objects."""
    service_account: Name = "dist-sae"
    """Service account of the pods. Its web identity, such as IRSA, gives access to the store."""
    context: str | None = None
    """Context in the kubeconfig. null: the current one."""
    jobset: bool = True
    """true: create one JobSet. false: create plain Indexed Jobs, for clusters without JobSet."""
    queue: DnsLabel | None = None
    """Kueue LocalQueue. null: do not use Kueue."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of all pods. Use `secrets` for secret values."""
    secrets: tuple[Name, ...] = ()
    """Secrets whose keys become environment variables, such as AWS keys or a hub token."""
    config_maps: tuple[Name, ...] = ()
    """ConfigMaps whose keys become environment variables."""
    port: Annotated[int, Field(ge=1024, le=65_535)] = 9400
    """Metrics port of each pod if `telemetry.port` is null."""
    rendezvous_port: Annotated[int, Field(ge=1024, le=65_535)] = 29_500
    """Port on the first trainer pod at which the trainer ranks meet."""
    keep_hours: PositiveFloat = 72.0
    """Hours after which a finished JobSet is deleted, with its pods and their logs."""
    cache: Annotated[dict[VolumeKind, dict[str, Any]], Field(min_length=1, max_length=1)] | None = (
        None
    )
    """Volume for model files that outlives the pods, written as in Kubernetes and mounted at
    /cache: {persistentVolumeClaim: {claimName: models}}. Models from the hub and from stores are
    cached there. `model.path` may also be a folder in the volume, and must be one in an `image`
    volume. null: each new pod downloads the model again."""
    planner: PodsConfig = PodsConfig(cpus=2.0, memory="8Gi")
    """Reads the corpus once and writes the plan."""
    producer: ProducerPods = ProducerPods()
    trainer: TrainerPods = TrainerPods()
    index: IndexPods = IndexPods()
    """Builds the latent index after training, unless `index.workers` is 0."""
    reporter: PodsConfig | None = PodsConfig()
    """Evaluates, exports and reports after training and the index. null: none of these."""
