"""Settings of a run on Kubernetes; a local run ignores them."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from dist_sae.config.base import Section, Shape

_ENDS = "with a letter or a digit first and last"
Quantity = Annotated[
    str,
    Shape(
        r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$", "write a number and a unit, as in 16Gi"
    ),
]
"""Amount of memory or disk in Kubernetes' notation: 16Gi."""
DnsLabel = Annotated[
    str,
    Shape(
        r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$",
        f"use lower-case letters, digits and '-', at most 63 of them, {_ENDS}",
    ),
]
Name = Annotated[
    str,
    Shape(
        r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$",
        f"use lower-case letters, digits, '-' and '.', at most 253 of them, {_ENDS}",
    ),
]
LabelKey = Annotated[
    str,
    Shape(
        r"^([a-z0-9][a-z0-9.-]*/)?[A-Za-z0-9][\w.-]{0,62}$",
        "write it as Kubernetes does: name or domain/name, as in nvidia.com/gpu",
    ),
]
Image = Annotated[
    str,
    Shape(r"^[a-z0-9][\w./:@-]*$", "write it as registry/name:tag or registry/name@sha256:..."),
]


def kubernetes_name(name: str) -> str:
    """A run's name as its objects on Kubernetes have it, where host names have no dots."""
    return name.replace(".", "-")


VolumeKind = Literal["csi", "ephemeral", "hostPath", "image", "nfs", "persistentVolumeClaim"]
TemplateKey = Annotated[
    str,
    Shape(r"^(metadata|spec)$", "a pod template has metadata and spec, and other keys are in them"),
]


class Toleration(Section):
    """A taint that pods tolerate, in Kubernetes' terms."""

    key: str | None = None
    """Key of the taint; null with `Exists` tolerates every taint."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """`Exists` ignores the taint's value, `Equal` compares it."""
    value: str | None = None
    """Value of the taint, for `Equal`."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; null tolerates all of them."""


class PodsConfig(Section):
    """Resources and placement of the pods of one part of a run."""

    cpus: PositiveFloat = 4.0
    """CPU cores requested."""
    memory: Quantity = "16Gi"
    """Memory request and limit of a pod; a pod that exceeds it is killed, not its neighbours."""
    gpus: NonNegativeInt = 0
    """GPUs of a pod."""
    gpu_resource: LabelKey = "nvidia.com/gpu"
    """Resource name of the nodes' GPUs."""
    scratch: Quantity = "20Gi"
    """Space for caches and temporary files (/tmp) on the node's disk; lost with the pod. A pod that
    takes more is evicted. The planner's holds the whole text, unpacked."""
    node_selector: dict[LabelKey, str] = Field(default_factory=dict)
    """Labels that nodes must have."""
    tolerations: tuple[Toleration, ...] = ()
    """Taints that pods tolerate."""
    priority_class: Name | None = None
    """PriorityClass of the pods; null takes the cluster's default."""
    grace_seconds: PositiveInt = 60
    """Seconds between SIGTERM and SIGKILL."""
    retries: NonNegativeInt = 6
    """Lives in a row of one pod and its successors, after a first one, that may end without
    progress, however they end; then the run fails. Progress is a new checkpoint (trainer), a unit
    (producer), a unit or a bucket (index); of the planner only crashes count. Of the reporter
    crashes count, in all. An exit with 2 fails the run at once."""
    pod_patch: dict[TemplateKey, dict[str, Any]] = Field(default_factory=dict)
    """A patch of the pod template, merged as `kubectl patch` does (strategic merge): annotations, a
    runtimeClassName, volumes, huge pages, IPC_LOCK, hostNetwork. The container of the program is
    named `main`."""


class SpreadPods(PodsConfig):
    """Pods that do not need one another."""

    spread_over: LabelKey | None = "kubernetes.io/hostname"
    """Node label (host or zone) over which pods are spread, where possible."""


class ProducerPods(SpreadPods):
    """Producer pods; each holds one producer, with all its `model.tensor_parallel` ranks."""

    apart: bool = False
    """A Job of their own beside the JobSet: Kueue admits and preempts it apart from the trainers,
    and `submit --replace` resizes it without touching them. Its pods begin at once and hold their
    devices while they wait for the plan, so plan first. false: a part of the JobSet."""
    queue: DnsLabel | None = None
    """Kueue's LocalQueue of producers that are apart; null takes `cluster.queue`."""
    least: PositiveInt | None = None
    """Kueue may admit so few of the producers that are apart, if it has no room for all (partial
    admission); it does not add to them later. null: all or none."""
    elastic: bool = False
    """Kueue lets more producers join those that run, and fewer go, without a restart (elastic Jobs:
    by default on from Kueue 0.18). Excludes `least`."""


class IndexPods(SpreadPods):
    """Pods of the latent index; each holds one worker, with all its `index.latent_shards` ranks."""


class TrainerPods(PodsConfig):
    """Trainer pods; each holds `ranks` of the `processes.trainers` ranks."""

    ranks: PositiveInt = 1
    """Ranks in a pod; with GPUs, each rank has its own."""
    grace_seconds: PositiveInt = 600
    """Seconds between SIGTERM and SIGKILL; must exceed two steps plus a checkpoint. `dist-sae
    status` warns when the last checkpoint took over half of it."""
    rdma: NonNegativeInt = 0
    """RDMA devices in a pod. If there are any and NCCL uses sockets, trainers stop with exit 2."""
    rdma_resource: LabelKey = "rdma/hca"
    """Resource name of the nodes' RDMA devices."""
    close_by: LabelKey | None = None
    """Node label whose value all trainer pods share, such as topology.kubernetes.io/zone; they wait
    until there is room for them."""


class ClusterConfig(Section):
    """Kubernetes settings (`dist-sae submit`)."""

    image: Image | None = None
    """Container image built from `launch/Dockerfile`, by digest or tag; `submit` needs it."""
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """Policy by which nodes pull the image."""
    pull_secrets: tuple[Name, ...] = ()
    """Secrets with which nodes pull the image."""
    namespace: DnsLabel = "dist-sae"
    """Namespace of all objects of the run."""
    service_account: Name = "dist-sae"
    """Service account of the pods; its web identity (IRSA and the like) gives access to the
    store."""
    context: str | None = None
    """Context of the kubeconfig; null takes the current one."""
    jobset: bool = True
    """Create one JobSet; false creates plain Indexed Jobs, for clusters without JobSet."""
    queue: DnsLabel | None = None
    """Kueue's LocalQueue; null does not queue."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of all pods; put secrets into `secrets` instead."""
    secrets: tuple[Name, ...] = ()
    """Secrets whose keys become environment variables, for example AWS keys or a hub's token."""
    config_maps: tuple[Name, ...] = ()
    """ConfigMaps whose keys become environment variables."""
    port: Annotated[int, Field(ge=1024, le=65_535)] = 9400
    """Metrics port of a pod, if `telemetry.port` is null."""
    rendezvous_port: Annotated[int, Field(ge=1024, le=65_535)] = 29_500
    """Port of the trainer ranks' rendezvous, on the first pod."""
    keep_hours: PositiveFloat = 72.0
    """Hours for which a finished JobSet, and with it the pods' logs, is kept."""
    cache: Annotated[dict[VolumeKind, dict[str, Any]], Field(min_length=1, max_length=1)] | None = (
        None
    )
    """A volume that keeps model files when a pod ends, in Kubernetes' terms, mounted at /cache:
    {persistentVolumeClaim: {claimName: models}}. Models from the hub and from stores are kept
    there; `model.path` may also be a folder in it, as it must be in an `image` volume. null: each
    new pod fetches the model again."""
    planner: PodsConfig = PodsConfig(cpus=2.0, memory="8Gi")
    """Reads the corpus once."""
    producer: ProducerPods = ProducerPods()
    trainer: TrainerPods = TrainerPods()
    index: IndexPods = IndexPods()
    """Make the latent index after training, unless `index.workers` is 0."""
    reporter: PodsConfig | None = PodsConfig()
    """Evaluates, exports and reports after training and the index; null does none of them."""
