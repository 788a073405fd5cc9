"""`dist-sae bench step` and `routed`: a training step against the bare product, or exact vs routed.

The step is the real one: the recipe's loss, DeepSpeed's engine, clipping, Adam, the constraint,
the count of dead latents. The product is the bare `x W_enc^T` in the step's precision, in the
fastest chunking found in the same run. Both are timed alternately and compared by the ratio of each
pair, so that other load on the machine does not distort the result. A routed dictionary skips most
of the product, but is compared with all of it, so that its ratio is comparable to an exact one's.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dist_sae.bench.measuring import compare, medians, peak_device_memory, used_bytes
from dist_sae.checkpoint.state import TrainingState
from dist_sae.config import Run
from dist_sae.config.load import resolve_run
from dist_sae.config.messages import sections_by_kind
from dist_sae.config.sae import SaeConfig
from dist_sae.dictionaries import PRODUCT_DTYPES, build_sae
from dist_sae.dictionaries.dead import DeadLatents
from dist_sae.dictionaries.interface import Rows, Widths
from dist_sae.distributed.engine import DeepSpeedEngine, Engine
from dist_sae.distributed.mesh import Mesh, join_mesh
from dist_sae.distributed.rendezvous import rendezvous
from dist_sae.kernels.choice import choose_kernels
from dist_sae.telemetry.process import resident_bytes
from dist_sae.training.job import training_step
from dist_sae.training.phases import Clock
from dist_sae.training.reporter import TrainingReporter

_CHUNKS = (1024, 2048, 4096, 8192, 16_384, 65_536)  # latents
_OPERATORS = {
    "product": "aten::mm",
    "norms": "aten::linalg_vector_norm",
}
"""Phases that are a single torch operator."""
_STATE_BYTES = 4 * 4  # per parameter: fp32 weight, gradient and two moments


class StepShape(NamedTuple):
    """Sizes and settings of the measured step."""

    d_in: int
    """Width of a site."""
    n_latents: int
    k: int
    batch: int
    products: str = "bf16"
    kernels: str = "auto"
    kind: str = "topk"
    experts: int | None = None
    """Experts of a routed dictionary."""
    reads: int = 1
    """Number of sites that the dictionary reads."""
    writes: int = 0
    """Number of other sites that the dictionary writes; 0 if it writes the sites that it reads."""
    settings: tuple[str, ...] = ()
    """Further settings of the recipe, as `KEY=VALUE`."""
    lr: float = 1e-4
    seed: int = 0

    @property
    def widths(self) -> Widths:
        """Widths of the sites that are read and written."""
        return Widths((self.d_in,) * self.reads, (self.d_in,) * (self.writes or self.reads))


class TrainingStep:
    """One optimizer step as in `train()`, on given rows.

    Args:
        shape: The step's sizes and settings. All ranks together take `shape.batch` rows.
        mesh: This rank's mesh.
    """

    def __init__(self, shape: StepShape, mesh: Mesh) -> None:
        self.run = bench_run(shape, mesh.world, mesh.axis.shards)
        self.mesh = mesh
        config: SaeConfig = self.run.sae
        self.sae = build_sae(
            config,
            shape.widths,
            mesh.axis,
            choose_kernels(self.run.train.kernels, mesh.device),
            PRODUCT_DTYPES[shape.products],
        ).to(mesh.device)
        self.dead = DeadLatents(
            len(self.sae.W_enc),
            self.run.dead_after_rows,
            mesh.axis,
            mesh.device,
            layers=self.sae.layers,
        )
        self._engine: Engine | None = None
        self._shape = shape
        self.load_ratio = 1.0
        """Rows of the busiest expert divided by the mean over experts, in the last step."""
        self.done = 0
        """Steps done."""

    def initialise(self, rows: Rows) -> None:
        """Initialize the dictionary from this rank's part of the first batch."""
        self.sae.initialise(rows, self._shape.seed)
        self._engine = self.build_engine()

    def build_engine(self) -> Engine:
        """Build the engine that updates the weights."""
        return DeepSpeedEngine(self.run, self.sae, self.mesh)

    def __call__(self, rows: Rows, report: TrainingReporter | None = None) -> float:
        """Take a step on this rank's part of a batch. Returns the FVU.

        Args:
            rows: Rows scaled to E|x|^2 = width.
            report: Reporter that the step is reported to, as in a real run; None by default.
        """
        engine = self._engine
        assert engine is not None, "call initialise() first"
        end = report.end if report else lambda _: None
        end("wait")
        output, norm, _ = training_step(
            rows,
            engine,
            self.dead,
            batch_rows=self._shape.batch,
            variance=float(self._shape.widths.d_out),
            progress=0.5,
            lr=self._shape.lr,
            end_phase=end,
        )
        self.done += 1
        if report:
            report.step(self.done, rows, output, lr=self._shape.lr, gradient_norm=norm)
        if output.routing:
            load = output.routing.load
            self.load_ratio = float(load.max() / load.double().mean())
        return float(output.terms.fvu.detach())

    @property
    def state(self) -> TrainingState:
        """The state that a checkpoint stores."""
        assert self._engine is not None, "call initialise() first"
        return TrainingState(self.sae, self._engine, self.dead, None)

    def reconstruct(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """Reconstruct scaled rows."""
        return self.sae.infer(x).x_hat


@contextmanager
def step_mesh(shape: StepShape, world: int = 1, shards: int = 1) -> Iterator[Mesh]:
    """Check the settings, then join a mesh of `world` ranks.

    Raises:
        ConfigError: The settings are invalid.
    """
    bench_run(shape, world, shards)
    with rendezvous(world) as ranks, join_mesh(ranks, shards) as mesh:
        yield mesh


def random_batches(shape: StepShape, mesh: Mesh, n: int) -> list[Rows]:
    """Draw this rank's part of `n` random batches."""
    generator = torch.Generator().manual_seed(shape.seed)
    local, widths = shape.batch // mesh.world, shape.widths

    def draw(width: int) -> Tensor:
        return torch.randn(local, width, generator=generator).to(mesh.device)

    inputs = [draw(widths.d_in) for _ in range(n)]
    return [Rows(x, draw(widths.d_out) if shape.writes else x) for x in inputs]


def program_bytes() -> int:
    """Return a trainer's resident memory after a step of a tiny dictionary, mostly libraries."""
    import dist_sae.training.loop  # noqa: F401 - with all that a trainer imports

    shape = StepShape(d_in=8, n_latents=16, k=2, batch=16)
    with step_mesh(shape) as mesh:
        step, (rows,) = TrainingStep(shape, mesh), random_batches(shape, mesh, 1)
        step.initialise(rows)
        step(rows)
        return resident_bytes()


def bench_step(shape: StepShape, mesh: Mesh, *, rounds: int) -> dict[str, Any]:
    """Time steps and bare products alternately.

    Returns:
        Medians over `rounds`: `step_seconds`, `product_seconds`, `rows_per_second`; `ratio` with
        `ratio_low` and `ratio_high` (quartiles of the pairs). Also `product_chunk`; `phases`, the
        seconds of one profiled step by kind of work, in device time on a GPU;
        `beyond_state_bytes`, the peak memory beyond parameters, gradients and moments (the GPU's,
        or else resident memory); `expert_load_ratio`, see `TrainingStep.load_ratio`.
    """
    batches = random_batches(shape, mesh, 2)
    step = TrainingStep(shape, mesh)
    step.initialise(batches[0])
    before = used_bytes(mesh.device)
    state_bytes = _STATE_BYTES * sum(p.numel() for p in step.sae.parameters())
    weight_bytes = 4 * sum(p.numel() for p in step.sae.parameters())  # weights, counted in `before`
    with peak_device_memory(mesh.device) as peak:
        for rows in batches:
            step(rows)  # warm-up: allocates Adam's moments and maps memory
    product, chunk = _fastest_product(shape, mesh, batches[0].inputs, step.sae.W_enc.detach())
    pairs = []
    for number in range(rounds):
        product_seconds = seconds(product, mesh)
        pairs.append((seconds(partial(step, batches[number % 2]), mesh), product_seconds))
    step_seconds, product_seconds = medians(pairs)
    return {
        **shape._asdict(),
        "replicas": mesh.axis.replicas,
        "shards": mesh.axis.shards,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "step_seconds": step_seconds,
        "product_seconds": product_seconds,
        "product_chunk": chunk,
        **compare(pairs),
        "rows_per_second": shape.batch / step_seconds,
        "beyond_state_bytes": max(0, peak[0] - before - (state_bytes - weight_bytes)),
        "expert_load_ratio": step.load_ratio,
        "phases": _phases(step, batches[0]),
    }


def bench_routed(shape: StepShape, mesh: Mesh, *, rounds: int) -> dict[str, Any]:
    """Time a routed step and an exact step of the same width alternately.

    Both dictionaries and their Adam states are in memory at once.

    Returns:
        Medians over `rounds`: `exact_seconds`, `routed_seconds`; `speedup`, exact / routed, with
        its quartiles `speedup_low` and `speedup_high`. Also `expert_load_ratio`, the rows of the
        busiest expert divided by the mean over experts.
    """
    batches = random_batches(shape, mesh, 2)
    exact = TrainingStep(shape._replace(kind="topk", experts=None), mesh)
    routed = TrainingStep(shape, mesh)
    for step in (exact, routed):
        step.initialise(batches[0])
        for rows in batches:
            step(rows)  # warm-up: allocates Adam's moments and maps memory
    pairs = []
    for number in range(rounds):
        rows = batches[number % 2]
        pairs.append((seconds(partial(exact, rows), mesh), seconds(partial(routed, rows), mesh)))
    exact_seconds, routed_seconds = medians(pairs)
    return {
        **shape._asdict(),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "exact_seconds": exact_seconds,
        "routed_seconds": routed_seconds,
        **compare(pairs, "speedup"),
        "expert_load_ratio": routed.load_ratio,
    }


def bench_run(
    shape: StepShape,
    world: int,
    shards: int,
    *,
    url: str | None = None,
    endpoint_url: str | None = None,
) -> Run:
    """Build a run with this training step, with AuxK if the recipe has it. Its data is never read.

    Args:
        shape: The step's sizes and settings.
        world: Number of ranks.
        shards: Latent shards of the dictionary.
        url: Both stores of the run; None for a folder that does not exist.
        endpoint_url: S3 endpoint of the stores.

    Raises:
        ConfigError: The settings are invalid.
    """
    url = url or str(Path("nowhere").absolute())
    reads = [f"mlp_in.{layer}" for layer in range(shape.reads)]
    writes = [f"mlp_out.{layer}" for layer in range(shape.writes)]
    sae: dict[str, Any] = {
        "kind": shape.kind,
        "n_latents": shape.n_latents,
        "reads": reads,
        "writes": writes or None,
        "init": "random",
        "dead_after_rows": 10_000_000,
    }
    counts = {"k": shape.k, "auxk": min(512, shape.n_latents), "experts": shape.experts}
    kinds = sections_by_kind(Run.model_fields["sae"].annotation)
    known = kinds[shape.kind].model_fields if shape.kind in kinds else {}
    return resolve_run(
        {
            "name": "bench",
            "store": {"activations": url, "runs": url, "s3": {"endpoint_url": endpoint_url}},
            "model": {"kind": "huggingface", "path": "nowhere"},
            "corpus": {"kind": "files", "files": ["nowhere"]},
            "activations": {"sites": [*reads, *writes], "streams": world},
            "sae": sae | {key: n for key, n in counts.items() if n is not None and key in known},
            "train": {
                "rows": shape.batch,
                "batch_rows": shape.batch,
                "lr": shape.lr,
                "products": shape.products,
                "kernels": shape.kernels,
            },
            "processes": {"trainers": world, "latent_shards": shards},
        },
        [f"sae.{setting}" for setting in shape.settings],
        "bench",
    )


def _fastest_product(
    shape: StepShape, mesh: Mesh, x: Tensor, W_enc: Tensor
) -> tuple[Callable[[], None], int]:
    """Return the bare product of the replica's rows and this shard's W_enc in its fastest chunking.

    Also returns the number of latents in a chunk.
    """
    # W_enc is narrower than x if each latent reads only one of several sites
    dtype, x = PRODUCT_DTYPES[shape.products], x[:, : W_enc.shape[1]]
    rows, weights = mesh.axis.gather(x).to(dtype), W_enc.to(dtype)
    timed = []
    for chunk in _CHUNKS:
        width = min(chunk, len(weights))
        out = torch.empty(len(rows), width, dtype=dtype, device=rows.device)

        def product(width: int = width, out: Tensor = out, n: int = len(weights)) -> None:
            for start in range(0, n, width):
                part = weights[start : min(start + width, n)]
                torch.mm(rows, part.T, out=out[:, : len(part)] if len(part) == width else None)

        # part of the latents is enough to compare chunkings
        some = partial(product, n=min(_CHUNKS[-1], len(weights)))
        some()
        fastest = min(seconds(some, mesh) for _ in range(3))
        timed.append((fastest, width, product))
        if width == len(weights):
            break
    _, width, product = min(timed, key=lambda entry: entry[0])
    return product, width


def seconds(work: Callable[[], Any], mesh: Mesh) -> float:
    """Time a call that all ranks make together, including the work on their devices."""
    mesh.barrier()
    _synchronise(mesh)
    since = time.perf_counter()
    work()
    _synchronise(mesh)
    return time.perf_counter() - since


def _synchronise(mesh: Mesh) -> None:
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)


def _phases(step: TrainingStep, rows: Rows) -> dict[str, float]:
    """Profile one step. Returns the seconds of each phase, in device time."""
    kernels, device, clock = step.sae.kernels, step.mesh.device, Clock(step.mesh.device)
    marks: list[tuple[str, Any, Any]] = []

    def labelled(label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **others: Any) -> Any:
            since = clock.mark()
            result = function(*arguments, **others)
            marks.append((label, since, clock.mark()))
            return result

        return timed

    step.sae.kernels = kernels._replace(
        keep_largest=labelled("select", kernels.keep_largest),
        combine=labelled("decode", kernels.combine),
        gather_dot=labelled("gradient_of_codes", kernels.gather_dot),
        sum_by_latent=labelled("gradients_of_weights", kernels.sum_by_latent),
        update=labelled("adam", kernels.update),
    )
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        since = clock.mark()
        step(rows)
        end = clock.mark()
        clock.await_(end)
    step.sae.kernels = kernels
    phases: dict[str, float] = {}
    for label, began, ended in marks:
        phases[label] = phases.get(label, 0.0) + clock.seconds(began, ended)
    measure = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    microseconds = {event.key: getattr(event, measure) for event in profile.key_averages()}
    for phase, operator in _OPERATORS.items():
        phases[phase] = microseconds.get(operator, 0.0) / 1e6
    phases["rest"] = clock.seconds(since, end) - sum(phases.values())
    return dict(sorted(phases.items(), key=lambda phase: -phase[1]))
