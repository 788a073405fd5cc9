"""`dist-sae train`: one rank of a training job. The loop is `train()`, below."""

import logging
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import closing
from itertools import chain
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from dist_sae import logs
from dist_sae.checkpoint.layout import Checkpoint, Checkpoints
from dist_sae.checkpoint.state import TrainingState
from dist_sae.config import Run, differences, dump_run
from dist_sae.data.consumers import Consumers, Registration
from dist_sae.data.loader import Batch, Loader, Place, Units
from dist_sae.data.normaliser import Normaliser, measure
from dist_sae.data.plan import Plan, check_rows, load_plan
from dist_sae.errors import ObjectNotFoundError, PlanMismatchError, Stopped
from dist_sae.parallel.engine import DeepSpeedEngine
from dist_sae.parallel.mesh import Mesh, check_replicated
from dist_sae.parallel.zero import deepspeed_config
from dist_sae.sae import PRODUCT_DTYPES, build_sae
from dist_sae.sae.base import Dictionary, Output, Step
from dist_sae.sae.dead import DeadLatents
from dist_sae.sae.ema import WeightAverage
from dist_sae.sae.init import initialise_from_data
from dist_sae.sae.kernels.choice import choose_kernels
from dist_sae.sae.schedules import learning_rate
from dist_sae.storage import ObjectStore, open_store
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.telemetry.history import History

logger = logging.getLogger(__name__)

_FAR_ABOVE_EPS = 10
_FREE_SETTINGS = {  # of a run: they change how it is done, not what comes out
    "store",
    "processes",
    "evaluate",
    "telemetry",
    "train.max_passes",  # later passes follow earlier ones: no batch changes
    "train.log_every_steps",
    "train.save_every_steps",
    "train.keep_checkpoints",
}


def train(
    run: Run, mesh: Mesh, stopping: threading.Event, telemetry: Telemetry
) -> dict[str, float]:
    """Fit the dictionary, from the newest checkpoint on if there is one.

    Args:
        run: The run.
        mesh: This rank's place among the ranks.
        stopping: When set on any rank, all save and stop.
        telemetry: Takes the metrics.

    Returns:
        `step` and `rows` reached, and the numbers last reported.

    Raises:
        ConfigError: These kernels or this DeepSpeed configuration cannot be.
        Stopped: Asked to stop; a checkpoint holds everything so far.
        DataExhaustedError: The activation set has too few rows.
        NonFiniteError: Loss or gradient; the weights were not touched.
    """
    deepspeed_config(run)  # refuses what it must before anything is read or written
    kernels = choose_kernels(run.train.kernels, mesh.device)
    runs, activations = (
        open_store(url, run.store.s3, telemetry, stopping)
        for url in (run.store.runs, run.store.activations)
    )
    plan = load_plan(activations, run)
    check_rows(run, plan)
    _own_run_folder(run, runs, mesh)

    units = Units(activations, plan, run.site, stopping)
    checkpoints = Checkpoints(runs, run.name, run.train.keep_checkpoints)
    checkpoint = checkpoints.latest()
    places = _places(run, checkpoint, plan)
    registration = _register(run, plan, activations, places, mesh)
    normaliser = (
        measure(units, run.train.normaliser_rows)
        if checkpoint is None
        else Normaliser.from_scalars(checkpoint.scalars)
    )
    sae = build_sae(
        run.sae, len(normaliser.mean), mesh.axis, kernels, PRODUCT_DTYPES[run.train.products]
    ).to(mesh.device)
    if checkpoint is None:
        _initialise(run, mesh, units, normaliser, sae)
    engine = DeepSpeedEngine(run, sae, mesh)
    dead = DeadLatents(len(sae.W_enc), run.sae.dead_after_rows, mesh.axis, mesh.device)
    average = WeightAverage(sae, run.train.ema_decay) if run.train.ema_decay else None
    state = TrainingState(sae, engine, dead, average)
    step = state.restore(checkpoint) if checkpoint is not None else 0
    logger.info("%s at step %d of %d", "resuming" if step else "starting", step, run.steps)
    report = _Reporter(run, mesh, telemetry, History(runs, run.name, step), step)
    scalars = normaliser.to_scalars() | {"plan": plan.hash}
    saver = _Saver(run, checkpoints, state, scalars, registration, mesh, report)

    with _loader(run, mesh, units, range(step, run.steps), places) as loader:
        while step < run.steps:
            batch = (
                loader.next()
            )  # None: no more to come, because of a stop or because there is none
            if mesh.agree(wish=batch is None or stopping.is_set()):
                saver.save(step, places)
                loader.raise_if_failed()
                raise Stopped(f"stopped at step {step} of {run.steps}; start again to go on")
            assert batch is not None
            x = batch.acts.to(mesh.device, torch.float32) * normaliser.scale
            now = Step(normaliser.variance, dead.mask, dead.count, progress=step / run.steps)
            output = engine.objective(x, now)
            engine.backward(output.terms.total)
            lr = _learning_rate(run, step)
            gradient_norm = engine.step(lr)  # raises NonFiniteError before it touches the weights
            dead.update(output.fired, run.train.batch_rows)
            if dead.n_stuck:
                engine.retie(dead.stuck, x, output.error)
            if average is not None:
                average.update()
            step += 1
            places = batch.places
            registration.at(places)
            report.step(step, batch, output, state, lr=lr, gradient_norm=gradient_norm)
            if step == run.steps or step % run.train.save_every_steps == 0:
                saver.save(step, places)
    return {"step": step, "rows": step * run.train.batch_rows, **report.last}


def _initialise(
    run: Run, mesh: Mesh, units: Units, normaliser: Normaliser, sae: Dictionary
) -> None:
    """The initial dictionary, from the first batch, or as many as it wants directions from."""
    n_batches = max(1, -(-run.sae.init_rows // run.train.batch_rows))

    def rows() -> Generator[Tensor]:
        with _loader(run, mesh, units, range(n_batches)) as loader:
            for _ in range(n_batches):
                batch = loader.next()
                if mesh.agree(wish=batch is None):
                    loader.raise_if_failed()
                    raise Stopped("stopped before the first step; start again to go on")
                assert batch is not None
                yield batch.acts.to(mesh.device, torch.float32) * normaliser.scale

    with closing(rows()) as batches:
        first = next(batches)
        sae.initialise(first, run.train.seed)
        if run.sae.init_rows:
            initialise_from_data(sae, chain([first], batches))


def _places(run: Run, checkpoint: Checkpoint | None, plan: Plan) -> Mapping[int, Place]:
    """Where the streams are, by number; none at the beginning.

    Raises:
        PlanMismatchError: The checkpoint is of a run on another activation set.
    """
    if checkpoint is None:
        return {}
    places = {int(v): Place(*place) for v, place in checkpoint.scalars["places"].items()}
    windows = range(0, plan.n_train_units // plan.streams, plan.window_units)
    if checkpoint.scalars["plan"] != plan.hash or not all(
        stream < plan.streams and place.first in windows for stream, place in places.items()
    ):
        raise PlanMismatchError(
            f"{run.store.runs}/{run.name}: was trained on another activation set than "
            f"{run.store.activations}; restore store.activations or choose another name"
        )
    return places


def _register(
    run: Run, plan: Plan, activations: ObjectStore, places: Mapping[int, Place], mesh: Mesh
) -> Registration:
    """Make the run known on the activation set."""
    store = run.store
    consumers = Consumers(activations, store.consumer_expiry_hours)
    registration = Registration(
        consumers,
        plan,
        run.name,
        keeps=run.train.max_passes > 1,
        retires=store.retention == "delete_consumed",
        speaks=mesh.is_first,
    )
    registration.begin(places)
    return registration


def _loader(
    run: Run, mesh: Mesh, units: Units, steps: range, places: Mapping[int, Place] | None = None
) -> Loader:
    return Loader(
        units,
        rank=mesh.rank,
        world=mesh.world,
        batch_rows=run.train.batch_rows,
        steps=steps,
        max_passes=run.train.max_passes,
        places=places,
    )


def _learning_rate(run: Run, step: int) -> float:
    train = run.train
    return learning_rate(
        step, run.steps, peak=run.lr, warmup_steps=train.warmup_steps, decay_share=train.decay_share
    )


def _own_run_folder(run: Run, runs: ObjectStore, mesh: Mesh) -> None:
    """Leave the resolved run in its folder, or find that another run lives there."""
    key = f"{run.name}/run.yaml"
    try:
        there = yaml.safe_load(runs.get(key))
    except ObjectNotFoundError:
        there = None
    if there is not None:
        changed = [
            line
            for line in differences(there, yaml.safe_load(dump_run(run)))
            if not any(line.startswith((f"{free}.", f"{free}:")) for free in _FREE_SETTINGS)
        ]
        if changed and Checkpoints(runs, run.name, 1).steps():  # else nothing was trained yet
            raise PlanMismatchError(
                f"{runs.url}/{run.name}: holds a run with other settings ({'; '.join(changed)}); "
                f"restore them or choose another name"
            )
    mesh.barrier()  # every rank has looked before the first one writes
    if mesh.is_first:
        runs.put(key, dump_run(run).encode())


class _Saver(NamedTuple):
    """Makes checkpoints."""

    run: Run
    checkpoints: Checkpoints
    state: TrainingState
    scalars: dict[str, Any]
    registration: Registration
    mesh: Mesh
    report: "_Reporter"

    def save(self, step: int, places: Mapping[int, Place]) -> None:
        """The first replica saves, each rank its shard; none goes on before all is done."""
        if step == 0 or step in self.checkpoints.steps():
            return  # the beginning can be made again
        since = time.monotonic()
        check_replicated(self.mesh, self.state.sae.b_dec)
        pieces = self.state.pieces()
        if self.mesh.axis.replica == 0:
            records = self.checkpoints.write(step, pieces)
        else:
            records = {}
            for _ in pieces:  # making them is collective
                pass
        everyones = self.mesh.everyones((records, places))
        size = 0
        if self.mesh.is_first:
            everywhere = {stream: place for _, own in everyones for stream, place in own.items()}
            size = self.checkpoints.commit(
                step, [records for records, _ in everyones], self.scalars | {"places": everywhere}
            )
            self.registration.durable(everywhere, ended=step == self.run.steps)
        self.mesh.barrier()
        self.report.saved(step, size, time.monotonic() - since)


class _Reporter:
    """Numbers about the run, for people: Prometheus, the run's history, the progress bar."""

    def __init__(
        self, run: Run, mesh: Mesh, telemetry: Telemetry, history: History, start: int
    ) -> None:
        self._run = run
        self._mesh = mesh
        self._telemetry = telemetry
        self._history = history
        self._since = (start, time.monotonic())
        self._waited = 0.0
        self.last: dict[str, float] = {}
        telemetry.set("dist_sae_train_steps", run.steps)

    def step(
        self,
        step: int,
        batch: Batch,
        output: Output,
        state: TrainingState,
        *,
        lr: float,
        gradient_norm: float,
    ) -> None:
        """Count a step; every `log_every_steps`, gather and publish. Collective then."""
        self._waited += batch.waited_seconds
        self._telemetry.add("dist_sae_train_stuck_latents_total", state.dead.n_stuck)
        if step % self._run.train.log_every_steps and step != self._run.steps:
            return
        axis, terms = self._mesh.axis, output.terms
        active = output.active / (len(batch.acts) * axis.shards)
        local = [terms.fvu.detach(), terms.auxk.detach(), terms.sparsity.detach(), active]
        fvu, auxk, sparsity, l0 = (axis.total(torch.stack(local)) / axis.replicas).tolist()
        first, then = self._since
        seconds = time.monotonic() - then
        self._since = (step, time.monotonic())
        rows = (step - first) * self._run.train.batch_rows
        numbers = {
            "fvu": fvu,
            "auxk_loss": auxk,
            "sparsity_loss": sparsity,
            "l0_latents": l0,
            "dead_share": state.dead.share,
            "starved_share": self._starved_share(state),
            "gradient_norm": gradient_norm,
            "learning_rate": lr,
            "rows_per_second": rows / seconds,
        }
        self.last = numbers
        self._publish(step, rows, seconds, numbers)
        self._waited = 0.0

    def _starved_share(self, state: TrainingState) -> float:
        """Of all latents: those whose encoder row learns as fast as eps, not Adam, lets it."""
        variance = state.engine.moment(state.sae.W_enc, "exp_avg_sq").mean(dim=1)
        starved = (variance.sqrt() < _FAR_ABOVE_EPS * self._run.train.eps).sum()
        return int(self._mesh.axis.total(starved)) / (
            self._mesh.axis.replicas * state.sae.n_latents
        )

    def _publish(self, step: int, rows: int, seconds: float, numbers: dict[str, float]) -> None:
        telemetry = self._telemetry
        for name, value in numbers.items():
            telemetry.set(f"dist_sae_train_{name}", value)
        telemetry.set("dist_sae_train_step", step)
        telemetry.add("dist_sae_train_rows_total", rows / self._mesh.world)
        telemetry.add("dist_sae_train_step_seconds_total", seconds)
        telemetry.add("dist_sae_train_wait_seconds_total", self._waited)
        if self._mesh.is_first:
            trained = step * self._run.train.batch_rows
            self._history.append(
                {
                    "step": step,
                    "rows": trained,
                    "seconds": seconds,
                    "wait_seconds": self._waited,
                    **numbers,
                }
            )
            shown = {
                name: numbers[name]
                for name in ("fvu", "l0_latents", "dead_share", "rows_per_second")
            }
            logs.progress(
                "train", step, self._run.steps, wait_share=self._waited / seconds, **shown
            )

    def saved(self, step: int, size: int, seconds: float) -> None:
        """A checkpoint is durable."""
        self._telemetry.set("dist_sae_checkpoint_step", step)
        self._telemetry.set("dist_sae_checkpoint_seconds", seconds)
        self._telemetry.set("dist_sae_checkpoint_bytes", size)
        if self._mesh.is_first:
            self._history.flush()
