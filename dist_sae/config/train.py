"""How the dictionary is trained and what it is measured on."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from dist_sae.config.base import Section, Shape
from dist_sae.config.data import Site

LAST_PORT = 65_535
PushgatewayUrl = Annotated[str, Shape(r"^https?://.+", "write http://host:port or https://host")]


class ParentConfig(Section):
    """A run in the same store.runs, from a checkpoint of which this one goes on."""

    run: str
    """Its name; its dictionary is of the same kind and site, and no wider."""
    step: PositiveInt | None = None
    """Step of its checkpoint; null takes the newest."""
    state: bool = True
    """Adam's moments, the counts of idle rows and the running mean go on as well, which takes equal
    width; false: the weights alone, their running mean if there is one."""
    data: Literal["continue", "restart"] = "continue"
    """Rows come from where it stopped, so that a pass gives none twice and `max_passes` counts its
    passes too; or from the beginning, also of another activation set."""


class TrainConfig(Section):
    """One training run over one site of an activation set."""

    site: Site | None = None
    """Which site to fit; may be left out when the activation set has one."""
    rows: PositiveInt | Literal["all"]
    """Rows to train on; repeats count. The run stops at the last full batch within them. all: what
    the plan gives in `max_passes`, less what a parent took whose data are gone on with."""
    max_passes: PositiveInt = 1
    """How often the data may be gone through to reach `rows`."""
    parent: ParentConfig | None = None
    """Go on from another run, as `--from NAME` does. `rows`, the learning rate, and the course of k
    and penalty are this run's own: they begin at its first step."""
    batch_rows: PositiveInt = 4096
    """Rows of one global batch, over all ranks."""
    lr: PositiveFloat | None = None
    """Learning rate; null gives 2e-4 * sqrt(2^14 / n_latents)."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises linearly from zero."""
    decay_share: float = Field(0.2, ge=0, le=1)
    """The learning rate falls linearly to zero over this last share of the steps."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    eps: PositiveFloat = 6.25e-10
    """Adam's epsilon; far below rare latents' gradients, or they never learn."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest norm of the global gradient; null turns clipping off."""
    products: Literal["bf16", "fp32"] = "bf16"
    """Precision of the encoder product. Parameters are always fp32."""
    normaliser_rows: PositiveInt | None = None
    """The scale and the mean of activations come from the first units with this many rows; null:
    those for which training waits anyway, 1 million rows at most."""
    kernels: Literal["auto", "torch", "native", "triton"] = "auto"
    """The sparse products; auto takes triton on NVIDIA GPUs, native (C++) on CPUs."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Keep a running mean of the weights with this decay per step, and evaluate and export it.

    In a run that is short for it the mean goes back over the last tenth of the steps.
    """
    seed: NonNegativeInt = 0
    """Decides what is random in the initial dictionary: all, or with `sae.init: data` .6 of each
    direction's length, the rest being a row that is the same for every seed. The order of rows, and
    which are held out, is the plan's (`activations.seed`)."""
    log_every_steps: PositiveInt = 10
    """Steps between two reports of losses, pace and densities."""
    save_every_steps: PositiveInt = 1000
    """Steps between two checkpoints."""
    save_beside: bool = True
    """Copy the state to the host's memory and store it beside the training; else training waits.

    The copy is as large as the state: 12 bytes per parameter of a rank's share.
    """
    keep_checkpoints: PositiveInt = 2
    """How many of the newest are kept."""
    keep_every_steps: PositiveInt | None = None
    """Checkpoints at multiples of this are kept as well."""
    keep_best: NonNegativeInt = 0
    """So many with the lowest held-out FVU are kept as well; needs `heldout_rows`."""
    heldout_rows: NonNegativeInt = 0
    """At each save FVU is measured on so many held-out rows, if they are there yet; 0: not."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Merged over the DeepSpeed configuration that this run derives (`dist-sae render`)."""


class EvaluateConfig(Section):
    """Held-out measurements."""

    rows: PositiveInt = 200_000
    """Held-out rows for FVU, L0 and densities; fewer are used when there are fewer."""
    contexts: NonNegativeInt = 64
    """Held-out contexts for the cross-entropy with the reconstruction spliced in."""
    latents: NonNegativeInt = 24
    """Latents shown in the report with their top activating text."""


class ExportConfig(Section):
    """What is said of a dictionary where others load it."""

    model_name: str | None = None
    """The model's name on the hub, where `model.path` is a folder; null takes `model.path`."""


class ProcessesConfig(Section):
    """How many processes share the work."""

    producers: PositiveInt = 1
    """Producers; each holds the language model, in `model.tensor_parallel` processes."""
    trainers: PositiveInt = 1
    """Trainer ranks."""
    latent_shards: PositiveInt = 1
    """Ranks that share one dictionary, each with its part of the latents. The trainers then hold
    trainers / latent_shards replicas of it."""
    threads: NonNegativeInt = 0
    """CPU threads of each process on a local run; 0 shares the cores out evenly."""


class TimeoutsConfig(Section):
    """When a job gives up a rank and ends, to be started again: trainers' ranks and producers'."""

    missing_seconds: PositiveFloat = 600
    """A rank that has not arrived this long after the first is missing."""
    lost_seconds: PositiveFloat = 30
    """A rank that has given no sign of life for this long is lost."""
    hung_seconds: PositiveFloat = 900
    """A rank that works on one step, or a producer on one batch, for this long is hung."""


class TelemetryConfig(Section):
    """Where a run's numbers go, beside its own folder."""

    port: NonNegativeInt | None = Field(None, le=LAST_PORT)
    """First port of Prometheus metrics: producers and trainer ranks of one machine count up from
    it. 0 takes any free port; null serves no metrics."""
    pushgateway_url: PushgatewayUrl | None = None
    """A Prometheus Pushgateway: programs that nobody can scrape, because they soon end (plan,
    evaluate, export, report), push their metrics there; null: they do not."""
    tensorboard: str | None = None
    """A folder of the first trainer's machine: curves as TensorBoard reads them, in `<run>/`."""
    wandb: str | None = None
    """A project of Weights & Biases: curves go there, under the run's name. Key, entity and mode
    are in WANDB_API_KEY, WANDB_ENTITY and WANDB_MODE."""
