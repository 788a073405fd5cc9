"""What a run asks of a Kubernetes cluster; a run on this machine takes no notice of it."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from dist_sae.config.base import Section, Shape

_ENDS = "with a letter or a digit first and last"
Quantity = Annotated[
    str,
    Shape(
        r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$", "write a number and a unit, as in 16Gi"
    ),
]
"""As Kubernetes writes amounts of memory and disk: 16Gi."""
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


class Toleration(Section):
    """A taint that pods put up with, as Kubernetes writes it."""

    key: str | None = None
    """Key of the taint; null with `Exists` tolerates every taint."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """Whether the taint's value matters."""
    value: str | None = None
    """Value of the taint, for `Equal`."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; null tolerates all of them."""


class PodsConfig(Section):
    """What the pods of one part of a run ask for."""

    cpus: PositiveFloat = 4.0
    """CPU cores requested."""
    memory: Quantity = "16Gi"
    """Requested, and the limit: a pod that needs more is killed rather than its neighbours."""
    gpus: NonNegativeInt = 0
    """GPUs of a pod."""
    gpu_resource: LabelKey = "nvidia.com/gpu"
    """What the nodes call their GPUs."""
    scratch: Quantity = "20Gi"
    """Room for caches (model files, compiled kernels) on the node's disk; lost with the pod."""
    node_selector: dict[LabelKey, str] = Field(default_factory=dict)
    """Labels that nodes must have."""
    tolerations: tuple[Toleration, ...] = ()
    """Taints that pods put up with."""
    priority_class: Name | None = None
    """PriorityClass of the pods; null takes the cluster's default."""
    grace_seconds: PositiveInt = 60
    """Between SIGTERM and SIGKILL."""
    retries: NonNegativeInt = 6
    """Crashes (a bug, out of memory) after which the run has failed. Preemptions, evictions and
    exits with 75 are not counted; an exit with 2 is final at once."""


class ProducerPods(PodsConfig):
    """One pod is one producer, with all `model.tensor_parallel` ranks of it."""

    spread_over: LabelKey | None = "kubernetes.io/hostname"
    """Spread over nodes (or zones) by this label, where that is possible."""


class TrainerPods(PodsConfig):
    """One pod holds `ranks` of the `processes.trainers` ranks."""

    ranks: PositiveInt = 1
    """Ranks of a pod; where there are GPUs, each has one of its own."""
    grace_seconds: PositiveInt = 600
    """Longer than a step and a checkpoint: `dist-sae status` warns when the last one took over half
    of it."""
    rdma: NonNegativeInt = 0
    """RDMA devices of a pod."""
    rdma_resource: LabelKey = "rdma/hca"
    """What the nodes call them."""
    close_by: LabelKey | None = None
    """Prefer nodes with one value of this label, for example topology.kubernetes.io/zone."""


class ClusterConfig(Section):
    """Where and how a run lives on Kubernetes (`dist-sae submit`)."""

    image: Image | None = None
    """The image of `launch/Dockerfile`, by digest or tag; `submit` needs it."""
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When nodes pull the image."""
    pull_secrets: tuple[Name, ...] = ()
    """Secrets with which nodes pull the image."""
    namespace: DnsLabel = "dist-sae"
    """Namespace of all objects of the run."""
    service_account: Name = "dist-sae"
    """Its web identity (IRSA and the like) is what the pods reach the store with."""
    context: str | None = None
    """Of the kubeconfig; null takes the current one."""
    jobset: bool = True
    """One JobSet; false makes plain Indexed Jobs, for clusters without it."""
    queue: DnsLabel | None = None
    """Kueue's LocalQueue; null does not queue."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment of all pods. No secrets: those belong into `secrets`."""
    secrets: tuple[Name, ...] = ()
    """Secrets whose keys become environment variables, for example AWS keys or a hub's token."""
    config_maps: tuple[Name, ...] = ()
    """The same of ConfigMaps."""
    port: Annotated[int, Field(ge=1024, le=65_535)] = 9400
    """Metrics of a pod, where `telemetry.port` names none."""
    rendezvous_port: Annotated[int, Field(ge=1024, le=65_535)] = 29_500
    """Where the trainer ranks meet, on the first pod."""
    keep_hours: PositiveFloat = 72.0
    """A finished JobSet, and with it the pods' logs, stays for so long."""
    planner: PodsConfig = PodsConfig(cpus=2.0, memory="8Gi")
    """Reads the corpus once."""
    producer: ProducerPods = ProducerPods()
    trainer: TrainerPods = TrainerPods()
    reporter: PodsConfig | None = PodsConfig()
    """Evaluates, exports and reports when the training has ended; null: nobody does."""
