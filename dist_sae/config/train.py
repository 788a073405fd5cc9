"""Sections about training, evaluation, export, processes and telemetry."""

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
        "use lower-case letters, digits, '-', '_' and '.', with a letter or a digit first and last",
    ),
]


class ParentConfig(Section):
    """The parent, a run in the same store.runs from whose checkpoint this run continues."""

    run: str
    """Name of the parent; its dictionary has the same kind and site, and is not wider."""
    step: PositiveInt | None = None
    """Step of the parent's checkpoint; null takes the newest."""
    state: bool = True
    """Take over Adam's moments, the counts of idle rows and the running mean too (needs equal
    width); false takes the weights alone, or their running mean if there is one."""
    data: Literal["continue", "restart"] = "continue"
    """continue: read on where the parent stopped, so that a pass repeats no row and `max_passes`
    counts the parent's passes too. restart: read from the beginning, also of another activation
    set."""


class TrainConfig(Section):
    """One training run over one site of an activation set."""

    site: Site | None = None
    """Site to fit; may be omitted if the activation set has only one."""
    rows: PositiveInt | Literal["all"]
    """Rows to train on; repeats count. The run stops at the last full batch within them. all: all
    training rows of the plan, `max_passes` times, less those that a parent has read if this run
    continues its data."""
    max_passes: PositiveInt = 1
    """Most passes over the data to reach `rows`."""
    parent: ParentConfig | None = None
    """Continue from another run, as `--from NAME` does. `rows` and the schedules of learning rate,
    k and penalty are this run's own: they begin at its first step."""
    batch_rows: PositiveInt = 4096
    """Rows in a global batch, over all ranks."""
    lr: PositiveFloat | None = None
    """Learning rate; null gives 2e-4 * sqrt(2^14 / n_latents)."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises linearly from zero."""
    decay_share: float = Field(0.2, ge=0, le=1)
    """Last share of the steps, over which the learning rate falls linearly to zero."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    eps: PositiveFloat = 6.25e-10
    """Adam's epsilon; must be far below the gradients of rare latents, or they never learn."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest norm of the global gradient; null turns clipping off."""
    products: Literal["bf16", "fp32"] = "bf16"
    """Precision of the encoder product. Parameters are always fp32."""
    normaliser_rows: PositiveInt | None = None
    """Rows from the first units that set the scale and the mean of activations; null: those of the
    units for which training waits anyway, at most 1 million."""
    kernels: Literal["auto", "torch", "native", "triton"] = "auto"
    """Implementation of the sparse products; auto takes triton on NVIDIA GPUs, native (C++) on
    CPUs."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay per step of a running mean of the weights, which is evaluated and exported; null keeps
    none.

    In a run too short for the decay, the mean covers the last tenth of the steps.
    """
    seed: NonNegativeInt = 0
    """Seed of the initial dictionary: of all of it, or with `sae.init: data` of .6 of each
    direction's length, the rest being a row that is the same for every seed. `activations.seed`
    decides the order of rows and which are held out."""
    log_every_steps: PositiveInt = 10
    """Steps between two reports of losses, pace and densities."""
    save_every_steps: PositiveInt = 1000
    """Steps between two checkpoints."""
    save_in_background: bool = True
    """Save in the background, from a copy of the state in host memory; false: training waits.

    The copy takes 12 bytes per parameter of a rank's share.
    """
    keep_checkpoints: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    keep_every_steps: PositiveInt | None = None
    """Keep checkpoints at multiples of this many steps as well."""
    keep_best: NonNegativeInt = 0
    """Keep this many checkpoints with the lowest held-out FVU as well; needs `heldout_rows`."""
    heldout_rows: NonNegativeInt = 0
    """Held-out rows on which FVU is measured at each save, once they are produced; 0 turns it
    off."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Merged over the DeepSpeed configuration that this run derives (`dist-sae render`)."""


class EvaluateConfig(Section):
    """Sizes of the held-out measurements."""

    rows: PositiveInt = 200_000
    """Held-out rows for FVU, L0 and densities, or all if there are fewer."""
    contexts: NonNegativeInt = 64
    """Held-out contexts for the cross-entropy with the reconstruction spliced in."""
    latents: NonNegativeInt = 24
    """Latents of the index that the report shows, with their top activating text."""
    memory_bytes: int = Field(2_000_000_000, ge=100_000_000)
    """Memory for the dictionary and the rows it meets, beside what the program itself and the
    language model take. A dictionary that takes at most half stays in memory; a wider one is read
    part by part, again for each batch of rows, of which more memory makes fewer."""


class NeuronpediaConfig(Section):
    """Names that Neuronpedia has for what is exported to it."""

    model: NeuronpediaName | None = None
    """Id of the model there; null takes the last part of the model's name, in lower case."""
    source_set: NeuronpediaName | None = None
    """Id of the set of sources, one for each layer; null takes the run's name."""
    creator: str = "clkht01d40000jv08hvalcvly"
    """Id of the user there to whom all belongs, who must exist; the default is the one that a new
    database of Neuronpedia has."""


class ExportConfig(Section):
    """Metadata of an exported dictionary."""

    model_name: str | None = None
    """Name of the model on the hub if `model.path` is a folder; null takes `model.path`."""
    neuronpedia: NeuronpediaConfig = NeuronpediaConfig()
    """Names for `dist-sae export --format neuronpedia`."""


class ProcessesConfig(Section):
    """Numbers of processes, and the device they compute on."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` uses GPUs where there are any; `cuda` ends with exit code 2 where none can be used, as
    pods with `gpus` do; `cpu` leaves them alone. The GPUs of a machine are shared out to its
    processes in turn, trainer ranks first."""

    producers: PositiveInt = 1
    """Number of producers; each holds the language model, in `model.tensor_parallel` processes."""
    trainers: PositiveInt = 1
    """Number of trainer ranks."""
    latent_shards: PositiveInt = 1
    """Ranks over which one dictionary is sharded; there are trainers / latent_shards replicas."""
    threads: NonNegativeInt = 0
    """CPU threads of each process in a local run; 0 divides the cores evenly."""


class TimeoutsConfig(Section):
    """Time-outs of waits for other processes; the program then ends with 75, to be restarted."""

    missing_seconds: PositiveFloat = 600
    """Seconds after the first rank's arrival when an absent rank counts as missing; also seconds
    without a sign of producers after which `evaluate` waits no longer for a unit."""
    lost_seconds: PositiveFloat = 30
    """Seconds without a heartbeat after which a rank counts as lost."""
    hung_seconds: PositiveFloat = 900
    """Seconds in one step (a producer: in one batch) after which a rank counts as hung."""


class TelemetryConfig(Section):
    """Destinations of a run's metrics, beside its own folder."""

    port: NonNegativeInt | None = Field(None, le=LAST_PORT)
    """First Prometheus port; producers and trainer ranks of one machine count up from it. 0 takes
    any free port; null serves no metrics."""
    pushgateway_url: PushgatewayUrl | None = None
    """Prometheus Pushgateway for programs too short to be scraped (plan, evaluate, export, report);
    null pushes nothing."""
    tensorboard: str | None = None
    """Folder on the first trainer's machine for TensorBoard curves, in `<run>/`."""
    wandb: str | None = None
    """Weights & Biases project for curves, under the run's name; set WANDB_API_KEY, WANDB_ENTITY
    and WANDB_MODE."""
