"""Sections for training, evaluation, export, processes, timeouts and telemetry."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from dist_sae.config.base import Section, Shape
from dist_sae.config.data import Site

LAST_PORT = 65_535
PushgatewayUrl = Annotated[str, Shape(r"^https?://.+", "write http://host:port or https://host")]


NeuronpediaName = Annotated[
    str,
    Shape(
        r"^[a-z0-9]([a-z0-9._-]{0,120}[a-z0-9])?$",
        "use lower-case letters, digits, '-', '_' and '.', and start and end with a letter or a "
        "digit",
    ),
]


class ParentConfig(Section):
    """The parent: a run in the same store.runs from whose checkpoint this run starts."""

    run: str
    """Name of the parent. Its dictionary must have the same kind and site, and must not be
    wider."""
    step: PositiveInt | None = None
    """Step of the parent's checkpoint. null: the newest."""
    state: bool = True
    """true: also take over Adam's moments, the idle rows of each latent, and the running mean of
    the weights. The widths must be equal. false: take over only the weights, or their running mean
    if there is one."""
    data: Literal["continue", "restart"] = "continue"
    """continue: start reading where the parent stopped. A pass then repeats no row, and
    `max_passes` includes the parent's passes. restart: read from the beginning. This also works
    with another activation set."""


class TrainConfig(Section):
    """How the dictionary is trained."""

    site: Site | None = None
    """Site to train on. May be omitted if the activation set has only one. Excludes `sae.reads`."""
    rows: PositiveInt | Literal["all"]
    """Number of rows to train on, counting repeats. The run stops after the last full batch. all:
    all training rows of the plan, `max_passes` times, without the rows that a parent has read if
    this run continues its data."""
    max_passes: PositiveInt = 1
    """Maximum number of passes over the data to reach `rows`."""
    parent: ParentConfig | None = None
    """Start from another run's checkpoint, as `--from NAME` does. `rows` and the schedules of
    learning rate, k and penalty are this run's own and start at its first step."""
    batch_rows: PositiveInt = 4096
    """Number of rows in a batch, over all ranks."""
    lr: PositiveFloat | None = None
    """Learning rate. null: 2e-4 * sqrt(2^14 / n_latents)."""
    warmup_steps: NonNegativeInt = 0
    """Number of steps at the start over which the learning rate rises linearly from zero."""
    decay_share: float = Field(0.2, ge=0, le=1)
    """Share of the steps, at the end, over which the learning rate falls linearly to zero."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates beta1 and beta2."""
    eps: PositiveFloat = 6.25e-10
    """Adam's epsilon. Must be far below the gradients of rare latents, or those never learn."""
    clip_norm: PositiveFloat | None = 1.0
    """Maximum norm of the global gradient. null: no clipping."""
    products: Literal["bf16", "fp32"] = "bf16"
    """Precision of the encoder product. Parameters are always fp32."""
    normaliser_rows: PositiveInt | None = None
    """Number of rows, from the first units, that set the scale and the mean of activations. null:
    most rows of the units that training waits for anyway, at most 1 million."""
    kernels: Literal["auto", "torch", "native", "triton"] = "auto"
    """Implementation of the sparse products. auto: triton on NVIDIA GPUs, native (C++) on CPUs."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay per step of a running mean of the weights, which is evaluated and exported in place of
    the weights. null: no running mean.

    In a run too short for the decay, the mean covers the last tenth of the steps.
    """
    seed: NonNegativeInt = 0
    """Seed of the initial dictionary. With `sae.init: data` it decides only a random part, .6 of
    each direction's length; the rest is a row, the same for every seed. `activations.seed` decides
    the order of rows and which rows are held out."""
    log_every_steps: PositiveInt = 10
    """Steps between two log entries with losses, rows per second and firing frequencies."""
    save_every_steps: PositiveInt = 1000
    """Steps between two checkpoints."""
    save_in_background: bool = True
    """true: save in the background from a copy of the state in host memory. false: training waits.

    The copy takes 12 bytes per parameter of a rank's shard.
    """
    keep_checkpoints: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    keep_every_steps: PositiveInt | None = None
    """Also keep the checkpoints at multiples of this number of steps."""
    keep_best: NonNegativeInt = 0
    """Also keep this many checkpoints with the lowest held-out FVU. Needs `heldout_rows`."""
    heldout_rows: NonNegativeInt = 0
    """Number of held-out rows on which FVU is measured at each checkpoint, once they are produced.
    0 turns this off."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Settings that override the generated DeepSpeed configuration, which `dist-sae render`
    prints."""


class EvaluateConfig(Section):
    """How much held-out data is measured, and with how much memory."""

    rows: PositiveInt = 200_000
    """Number of held-out rows for FVU, L0 and firing frequencies. All are used if there are
    fewer."""
    contexts: NonNegativeInt = 64
    """Number of held-out contexts for the cross-entropy with activations replaced by
    reconstructions. 0 turns this off."""
    latents: NonNegativeInt = 24
    """Number of latents that the report shows, with their top activating text from the index."""
    memory_bytes: int = Field(2_000_000_000, ge=100_000_000)
    """Memory for the dictionary and its rows, in addition to that of the program and the language
    model. A dictionary that takes at most half of it stays in memory. A wider one is read in parts,
    once for each batch of rows; more memory means larger and fewer batches."""


class NeuronpediaConfig(Section):
    """Ids to use in an export for Neuronpedia."""

    model: NeuronpediaName | None = None
    """Neuronpedia's id of the model. null: the last part of the model's name, in lower case."""
    source_set: NeuronpediaName | None = None
    """Neuronpedia's id of the source set, which has one source per layer. null: the run's name."""
    creator: str = "clkht01d40000jv08hvalcvly"
    """Id of the Neuronpedia user who owns the export. The user must exist. The default exists in
    every new Neuronpedia database."""


class ExportConfig(Section):
    """Metadata of an exported dictionary."""

    model_name: str | None = None
    """Name of the model on the hub, if `model.path` is a folder. null: `model.path`."""
    neuronpedia: NeuronpediaConfig = NeuronpediaConfig()
    """Ids for `dist-sae export --format neuronpedia`."""


class ProcessesConfig(Section):
    """Numbers of processes, and the device that they use."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: use GPUs if there are any. cuda: exit with code 2 if no GPU can be used; pods with
    `gpus` do the same. cpu: do not use GPUs. A machine's GPUs are assigned to its processes in
    turn, trainer ranks first."""

    producers: PositiveInt = 1
    """Number of producers. Each loads the language model, in `model.tensor_parallel` processes."""
    trainers: PositiveInt = 1
    """Number of trainer ranks."""
    latent_shards: PositiveInt = 1
    """Number of ranks over which one dictionary is sharded. The number of replicas is trainers /
    latent_shards."""
    threads: NonNegativeInt = 0
    """CPU threads per process in a local run. 0: divide the cores evenly."""


class TimeoutsConfig(Section):
    """Timeouts for other processes. The program then exits with 75 and can be restarted."""

    missing_seconds: PositiveFloat = 600
    """Seconds after the first rank's arrival at which an absent rank counts as missing. Also the
    seconds without a sign of life from any producer after which `evaluate`, `index` and `analyse`
    stop waiting for a unit."""
    lost_seconds: PositiveFloat = 30
    """A rank counts as lost if it sends no heartbeat for this many seconds."""
    hung_seconds: PositiveFloat = 900
    """A rank counts as hung if one step (for a producer: one batch) takes longer than this."""


class TelemetryConfig(Section):
    """Where a run's metrics go, in addition to its own folder."""

    port: NonNegativeInt | None = Field(None, le=LAST_PORT)
    """First Prometheus port. The producers and trainer ranks of a machine use this port and the
    following ones. 0: any free port. null: no metrics."""
    pushgateway_url: PushgatewayUrl | None = None
    """URL of the Prometheus Pushgateway for programs that end too soon to be scraped (plan,
    evaluate, export, report). null: push nothing."""
    tensorboard: str | None = None
    """Folder for TensorBoard logs on the first trainer's machine. The run's logs are in its
    subfolder `<run>/`."""
    wandb: str | None = None
    """Weights & Biases project for curves, under the run's name. Set WANDB_API_KEY, WANDB_ENTITY
    and WANDB_MODE in the environment."""
