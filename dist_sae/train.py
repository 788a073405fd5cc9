"""`dist-sae train`: one rank of a training job. The loop is `train()`, below."""

import logging
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from dist_sae.checkpoint import warm_start
from dist_sae.checkpoint.folder import run_file_key
from dist_sae.checkpoint.layout import Checkpoint, Checkpoints
from dist_sae.checkpoint.saver import Saved, Saver
from dist_sae.checkpoint.state import TrainingState
from dist_sae.config import Run, dump_run
from dist_sae.config.deciding import as_begun, changes, check_same_run, deciding
from dist_sae.data.backlog import ReadyUnits
from dist_sae.data.consumers import Consumers, Registration
from dist_sae.data.heldout import are_there, rows_of
from dist_sae.data.loader import Batch, Loader, Place, Units
from dist_sae.data.normaliser import Normaliser, measure
from dist_sae.data.plan import Plan, check_rows, load_plan
from dist_sae.errors import CorruptObjectError, ObjectNotFoundError, PlanMismatchError, Stopped
from dist_sae.parallel.engine import DeepSpeedEngine
from dist_sae.parallel.mesh import Mesh, check_replicated
from dist_sae.parallel.watch import Watch
from dist_sae.parallel.zero import deepspeed_config
from dist_sae.precision import warn_if_emulated
from dist_sae.reporting.times import Times
from dist_sae.reporting.training import TrainingReporter
from dist_sae.sae import PRODUCT_DTYPES, build_sae
from dist_sae.sae.base import Dictionary, Step
from dist_sae.sae.dead import DeadLatents
from dist_sae.sae.ema import WeightAverage
from dist_sae.sae.init import initialise_from_data
from dist_sae.sae.kernels.choice import choose_kernels
from dist_sae.sae.schedules import learning_rate
from dist_sae.storage import ObjectStore, open_store
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.telemetry.sinks import open_sinks

logger = logging.getLogger(__name__)


def train(
    run: Run, mesh: Mesh, watch: Watch, stopping: threading.Event, telemetry: Telemetry
) -> dict[str, float]:
    """Fit the dictionary, from the newest checkpoint on if there is one.

    Args:
        run: The run.
        mesh: This rank's place among the ranks.
        watch: Is told where the training is.
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
    times = Times(run, telemetry, mesh.device)
    job = _begin(run, mesh, stopping, telemetry, times)
    run, normaliser, state = job.run, job.normaliser, job.state
    step, places = job.step, job.places
    sae, engine, dead, average = state.sae, job.engine, state.dead, state.average
    logger.info("%s at step %d of %d", "resuming" if step else "starting", step, run.steps)
    report = _reporter(run, mesh, telemetry, times, job)
    heldout = _Heldout(run, mesh, job.units, normaliser)

    def save() -> None:
        watch.at(step, working=False)
        check_replicated(mesh, [sae.get_parameter(name) for name in sae.shared])
        fvu = heldout.fvu(sae)
        report.heldout(step, fvu)
        saver.save(step, places, heldout_fvu=fvu)
        report.end("save")

    def durable(saved: Saved) -> None:
        job.registration.durable(saved.places, ended=saved.step == run.steps)
        report.saved(saved)

    with (
        report,
        _backlog(job.units, mesh, report),
        Saver(
            job.checkpoints,
            state,
            normaliser.to_scalars() | {"plan": job.units.plan.hash, "run": deciding(run)},
            everyones=mesh.beside().everyones,
            first=mesh.is_first,
            before=report.flush,
            durable=durable,
            step=step,
            beside=run.train.save_beside,
        ) as saver,
        _loader(run, mesh, job.units, range(step, run.steps), places) as loader,
    ):
        report.end("begin")
        while step < run.steps:
            watch.at(step, working=False)
            batch = _next(loader, mesh, stopping, times)
            if batch is None:
                save()
                saver.finish()
                loader.raise_if_failed()
                raise Stopped(f"stopped at step {step} of {run.steps}; start again to go on")
            watch.at(step, working=True)
            x = batch.acts.to(mesh.device, torch.float32) * normaliser.scale
            report.end("rest")
            output = engine.objective(
                x, Step(normaliser.variance, dead.mask, dead.count, progress=step / run.steps)
            )
            report.end("forward")
            engine.backward(output.terms.total)
            report.end("backward")
            lr = _learning_rate(run, step)
            gradient_norm = engine.step(lr)  # raises NonFiniteError before it touches the weights
            report.end("optimiser")
            dead.update(output.fired, run.train.batch_rows)
            if dead.n_stuck:
                engine.retie(dead.stuck, x, output.error)
            if average is not None:
                average.update()
            step += 1
            places = batch.places
            job.registration.at(places)
            report.step(
                step,
                batch,
                x,
                output,
                lr=lr,
                gradient_norm=gradient_norm,
                loaded=loader.loaded,
                reached=job.registration.reached,
            )
            if step == run.steps or step % run.train.save_every_steps == 0:
                save()
    return {"step": step, "rows": step * run.train.batch_rows, **report.last}


def what_is_done(run: Run) -> dict[str, float] | None:
    """What `train` returned if the run has nothing left to do, else None.

    Asked before ranks meet: one that is started again when the others have ended for good would
    wait for them in vain.
    """
    runs = open_store(run.store.runs, run.store.s3)
    checkpoint = Checkpoints(runs, run.name, run.train.keep_checkpoints).latest()
    if checkpoint is None or checkpoint.step < run.steps:
        return None
    if changes(checkpoint.scalars["run"], run):  # which `train` refuses, and says why
        return None
    return {"step": checkpoint.step, "rows": checkpoint.step * run.train.batch_rows}


class _Job(NamedTuple):
    """What there is when the first step begins."""

    run: Run
    runs: ObjectStore
    units: Units
    checkpoints: Checkpoints
    registration: Registration
    normaliser: Normaliser
    engine: DeepSpeedEngine
    state: TrainingState
    step: int
    places: Mapping[int, Place]


def _begin(
    run: Run, mesh: Mesh, stopping: threading.Event, telemetry: Telemetry, times: Times
) -> _Job:
    """From the newest checkpoint that is whole, or else from the beginning."""
    deepspeed_config(run)  # refuses what it must before anything is read or written
    kernels = choose_kernels(run.train.kernels, mesh.device)
    warn_if_emulated("train.products", run.train.products, mesh.device)
    runs, activations = (
        open_store(url, run.store.s3, telemetry, stopping)
        for url in (run.store.runs, run.store.activations)
    )
    plan = load_plan(activations, run)
    check_rows(run, plan)
    units = Units(activations, plan, run.site, stopping)
    checkpoints = Checkpoints(
        runs,
        run.name,
        run.train.keep_checkpoints,
        every=run.train.keep_every_steps,
        best=run.train.keep_best,
    )
    registration = _registration(run, plan, activations, mesh)

    found = _found(checkpoints, runs, run, plan, mesh)
    if found:
        run = as_begun(run, found[0].scalars["run"])
    if mesh.is_first:
        runs.put(run_file_key(run.name), dump_run(run).encode())
    narrower = None if found else _narrower(runs, run, mesh)
    if found:
        normaliser = Normaliser.from_scalars(found[0].scalars)
    else:
        registration.begin({})
        times.end("begin")
        normaliser = measure(units, run.train.normaliser_rows, times.waiting)
        times.end("wait")
    if narrower:
        normaliser = normaliser.at(narrower.scalars["scale"])
    sae = build_sae(
        run.sae, len(normaliser.mean), mesh.axis, kernels, PRODUCT_DTYPES[run.train.products]
    ).to(mesh.device)
    if not found:
        _initialise(run, mesh, units, normaliser, sae, narrower, times)
    engine = DeepSpeedEngine(run, sae, mesh)
    dead = DeadLatents(len(sae.W_enc), run.dead_after_rows, mesh.axis, mesh.device)
    average = WeightAverage(sae, run.train.ema_decay) if run.train.ema_decay else None
    state = TrainingState(sae, engine, dead, average)
    step, places = 0, dict[int, Place]()
    if found:
        checkpoint = _restore(state, found, checkpoints, mesh, telemetry)
        step, places = checkpoint.step, _places(checkpoint)
        durable_at = time.time() - checkpoints.age_seconds(step)
        telemetry.set("dist_sae_checkpoint_step", step)
        telemetry.set("dist_sae_checkpoint_timestamp_seconds", durable_at)
        registration.begin(places)
    return _Job(
        run, runs, units, checkpoints, registration, normaliser, engine, state, step, places
    )


def _narrower(runs: ObjectStore, run: Run, mesh: Mesh) -> Checkpoint | None:
    """What the run is to begin with, if anything. Collective."""
    narrower = warm_start.find(runs, run)
    if len(set(mesh.everyones(narrower and narrower.step))) > 1:
        raise Stopped(f"{run.name}/warm-start was written while the ranks began; start again")
    return narrower


def _initialise(
    run: Run,
    mesh: Mesh,
    units: Units,
    normaliser: Normaliser,
    sae: Dictionary,
    narrower: Checkpoint | None,
    times: Times,
) -> None:
    """The initial dictionary, from the first batch, or as many as it wants directions from."""
    known = warm_start.width(narrower) if narrower else 0
    n_rows = sae.n_latents - known if narrower else run.sae.init_rows
    n_batches = max(1, -(-n_rows // run.train.batch_rows))

    def rows() -> Generator[Tensor]:
        with _loader(run, mesh, units, range(n_batches)) as loader:
            for _ in range(n_batches):
                times.end("begin")
                batch = _next(loader, mesh, units.stopping, times)
                if batch is None:
                    loader.raise_if_failed()
                    raise Stopped("stopped before the first step; start again to go on")
                yield batch.acts.to(mesh.device, torch.float32) * normaliser.scale

    with closing(rows()) as batches:
        first = next(batches)
        sae.initialise(first, run.train.seed)
        if narrower:
            warm_start.load(sae, narrower)
        if n_rows:
            initialise_from_data(sae, chain([first], batches), known)


def _found(
    checkpoints: Checkpoints, runs: ObjectStore, run: Run, plan: Plan, mesh: Mesh
) -> list[Checkpoint]:
    """The checkpoints to go on from, the newest first; none at the beginning. Collective.

    Those whose manifest every rank could read: they must not go on from different ones.

    Raises:
        CorruptObjectError: There are some, and not one has a manifest that is whole.
        PlanMismatchError: They are of a run with other settings, or on another activation set.
    """
    found = list(checkpoints.newest_first())
    on_all = set.intersection(*mesh.everyones({checkpoint.step for checkpoint in found}))
    found = [checkpoint for checkpoint in found if checkpoint.step in on_all]
    if not found and checkpoints.steps():
        raise CorruptObjectError(
            "no checkpoint is whole; restore one, or train under another name",
            url=runs.url,
            key=run.name,
        )
    windows = range(0, plan.n_train_units // plan.streams, plan.window_units)
    for checkpoint in found:
        check_same_run(checkpoint.scalars["run"], run, f"{runs.url}/{run.name}")
        if checkpoint.scalars["plan"] != plan.hash or not all(
            stream < plan.streams and place.first in windows
            for stream, place in _places(checkpoint).items()
        ):
            raise PlanMismatchError(
                f"{run.store.runs}/{run.name}: was trained on another activation set than "
                f"{run.store.activations}; restore store.activations or choose another name"
            )
    return found


def _places(checkpoint: Checkpoint) -> dict[int, Place]:
    """Where the streams are, by number."""
    return {int(v): Place(*place) for v, place in checkpoint.scalars["places"].items()}


def _restore(
    state: TrainingState,
    found: Sequence[Checkpoint],
    checkpoints: Checkpoints,
    mesh: Mesh,
    telemetry: Telemetry,
) -> Checkpoint:
    """Put the run back to the first of these checkpoints that all ranks find whole.

    Raises:
        CorruptObjectError: There is none.
    """
    for checkpoint in found:
        damage: CorruptObjectError | ObjectNotFoundError | None = None
        try:
            take = state.read(checkpoint)
        except (CorruptObjectError, ObjectNotFoundError) as exc:
            damage = exc
        if mesh.agree(wish=damage is not None):
            if damage is not None:
                logger.error("%s; the checkpoint before is taken", damage)
            continue
        take()
        if mesh.is_first:  # later ones are damaged, and would be the newest again
            for step in checkpoints.steps():
                if step > checkpoint.step:
                    telemetry.add("dist_sae_checkpoint_damaged_total", 1)
                    checkpoints.delete(step)
        return checkpoint
    raise CorruptObjectError(
        "no checkpoint is whole; restore one, or train under another name",
        url=checkpoint.store.url,
    )


def _registration(run: Run, plan: Plan, activations: ObjectStore, mesh: Mesh) -> Registration:
    """How the store knows what this run still needs."""
    store = run.store
    return Registration(
        Consumers(activations, store.consumer_expiry_hours),
        plan,
        run.name,
        keeps=run.train.max_passes > 1,
        retires=store.retention == "delete_consumed",
        speaks=mesh.is_first,
    )


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


def _next(loader: Loader, mesh: Mesh, stopping: threading.Event, times: Times) -> Batch | None:
    """The next batch, when all ranks have theirs; None if one has none or is to stop. Collective.

    While one waits for its data all do.
    """
    batch = loader.next(times.waiting)
    waited = batch.waited_seconds if batch else 0.0
    times.end("wait")
    ends, longest = mesh.meet(wish=batch is None or stopping.is_set(), waited=waited)
    times.end("ranks", waited=longest - waited)
    return None if ends else batch


def _reporter(
    run: Run, mesh: Mesh, telemetry: Telemetry, times: Times, job: _Job
) -> TrainingReporter:
    sinks = open_sinks(run, job.runs, job.step) if mesh.is_first else []
    mean = job.normaliser.mean
    return TrainingReporter(run, mesh, telemetry, times, sinks, job.state, mean, job.step)


def _backlog(units: Units, mesh: Mesh, report: TrainingReporter) -> AbstractContextManager[object]:
    """Counts the units there are to read, on one rank."""
    if not mesh.is_first:
        return nullcontext()
    report.plan(len(units.plan.train_units))
    return ReadyUnits(units.store, units.plan, report.ready)


def _learning_rate(run: Run, step: int) -> float:
    train = run.train
    return learning_rate(
        step, run.steps, peak=run.lr, warmup_steps=train.warmup_steps, decay_share=train.decay_share
    )


class _Heldout:
    """The first held-out rows, each rank's share of them, to measure FVU on in mid-run."""

    def __init__(self, run: Run, mesh: Mesh, units: Units, normaliser: Normaliser) -> None:
        self._rows = run.train.heldout_rows // mesh.world
        self._mesh = mesh
        self._units = units
        self._normaliser = normaliser
        self._x: Tensor | None = None

    @torch.no_grad()
    def fvu(self, sae: Dictionary) -> float | None:
        """Of the weights as they are; None while held-out units are missing. Collective."""
        if not self._rows:
            return None
        if self._x is None and not self._read():
            return None
        assert self._x is not None
        centred = self._x - self._normaliser.mean.to(self._x)
        error = self._x - sae.infer(self._x).x_hat
        sums = torch.stack([error.square().sum(), centred.square().sum()])
        left, total = sae.axis.total(sums).tolist()
        return float(left / total)

    def _read(self) -> bool:
        numbers, mesh = self._units.plan.heldout_units, self._mesh
        if mesh.agree(wish=not are_there(self._units, numbers)):
            return False
        rows = torch.cat(list(rows_of(self._units, numbers, mesh.world * self._rows)))
        own = rows[mesh.rank * len(rows) // mesh.world :][: len(rows) // mesh.world]
        self._x = own.to(mesh.device) * self._normaliser.scale
        return True
