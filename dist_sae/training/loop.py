"""`dist-sae train`: one rank of a training job. The loop is `train()`, below."""

import logging
import threading
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dist_sae.checkpoint.saver import Saved, Saver
from dist_sae.checkpoint.state import TrainingState
from dist_sae.config import Run
from dist_sae.config.fingerprint import run_fingerprint
from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.backlog import ReadyUnits
from dist_sae.data.heldout import are_there, rows_of
from dist_sae.data.normaliser import Normaliser
from dist_sae.dictionaries.base import Rows, StepContext
from dist_sae.dictionaries.schedules import learning_rate
from dist_sae.distributed.mesh import Mesh, check_replicated
from dist_sae.distributed.watch import Watch
from dist_sae.errors import Stopped
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.telemetry.sinks import open_sinks
from dist_sae.training.clock import Times
from dist_sae.training.reporter import TrainingReporter
from dist_sae.training.setup import Job, begin, next_batch, open_loader

logger = logging.getLogger(__name__)


def train(
    run: Run, mesh: Mesh, watch: Watch, stopping: threading.Event, telemetry: Telemetry
) -> dict[str, float]:
    """Fit the dictionary, from the newest checkpoint on, or another run's (`train.parent`).

    Args:
        run: The run.
        mesh: This rank's place among the ranks.
        watch: Is told where the training is.
        stopping: When set on any rank, all save and stop.
        telemetry: Takes the metrics.

    Returns:
        `step` and `rows` reached, with ancestors also `rows_with_parents`, and the numbers last
        reported.

    Raises:
        ConfigError: These kernels, this parent or this DeepSpeed configuration cannot be.
        Stopped: Asked to stop; a checkpoint holds everything so far.
        DataExhaustedError: The activation set has too few rows.
        NonFiniteError: Loss or gradient; the weights were not touched.
    """
    times = Times(telemetry, mesh.device)
    job = begin(run, mesh, stopping, telemetry, times)
    run, normaliser, state = job.run, job.normaliser, job.state
    step, cursors, repeated_rows = job.step, job.cursors, 0
    sae, engine, dead, average = state.sae, job.engine, state.dead, state.average
    logger.info("%s at step %d of %d", "resuming" if step else "starting", step, run.steps)
    report = _reporter(run, mesh, telemetry, times, job)
    heldout = _Heldout(run, mesh, job.units, normaliser)

    def save() -> None:
        watch.at(step, working=False)
        check_replicated(mesh, [sae.get_parameter(name) for name in sae.shared])
        fvu = heldout.fvu(state)
        report.heldout(step, fvu)
        saver.save(
            step,
            cursors,
            heldout_fvu=fvu,
            repeated_rows=job.repeated_rows + sum(mesh.all_gather_objects(repeated_rows)),
        )
        report.end("save")

    def durable(saved: Saved) -> None:
        job.registration.durable(saved.cursors, ended=saved.step == run.steps)
        report.saved(saved)

    with (
        report,
        _backlog(job.units, mesh, report),
        Saver(
            job.checkpoints,
            state,
            normaliser.to_scalars()
            | {"plan": job.units.plan.hash, "run": run_fingerprint(run)}
            | job.lineage.to_scalars(),
            all_gather=mesh.in_background().all_gather_objects,
            first=mesh.is_first,
            before_commit=report.flush,
            on_durable=durable,
            step=step,
            background=run.train.save_beside,
        ) as saver,
        open_loader(run, mesh, job.units, range(step, run.steps), job.lineage, cursors) as loader,
    ):
        report.end("begin")
        while step < run.steps:
            watch.at(step, working=False)
            batch = next_batch(loader, mesh, stopping, times)
            if batch is None:
                save()
                saver.finish()
                loader.raise_if_failed()
                raise Stopped(f"stopped at step {step} of {run.steps}; start again to go on")
            watch.at(step, working=True)
            x = batch.acts.to(mesh.device, torch.float32) * normaliser.scale
            report.end("rest")
            output = engine.objective(
                Rows(inputs=x, targets=x),
                StepContext(normaliser.variance, dead.mask, dead.count, progress=step / run.steps),
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
                average.update(Rows(x, x), step / run.steps)
            step += 1
            cursors, repeated_rows = batch.cursors, repeated_rows + batch.repeated_rows
            job.registration.at(cursors)
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
    return {"step": step, **job.lineage.totals(step * run.train.batch_rows), **report.last}


def _reporter(
    run: Run, mesh: Mesh, telemetry: Telemetry, times: Times, job: Job
) -> TrainingReporter:
    sinks = open_sinks(run, job.runs, job.step) if mesh.is_first else []
    mean, counted = job.normaliser.mean, job.lineage.counted_rows
    return TrainingReporter(run, mesh, telemetry, times, sinks, job.state, mean, job.step, counted)


def _backlog(
    units: ActivationSet, mesh: Mesh, report: TrainingReporter
) -> AbstractContextManager[object]:
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

    def __init__(self, run: Run, mesh: Mesh, units: ActivationSet, normaliser: Normaliser) -> None:
        self._rows = run.train.heldout_rows // mesh.world
        self._mesh = mesh
        self._units = units
        self._normaliser = normaliser
        self._x: Tensor | None = None

    @torch.no_grad()
    def fvu(self, state: TrainingState) -> float | None:
        """Of what is evaluated; None while held-out units are missing. Collective."""
        if not self._rows:
            return None
        if self._x is None and not self._read():
            return None
        assert self._x is not None
        centred = self._x - self._normaliser.mean.to(self._x)
        with state.average.applied() if state.average else nullcontext():
            error = self._x - state.sae.infer(self._x).x_hat
        sums = torch.stack([error.square().sum(), centred.square().sum()])
        left, total = state.sae.axis.total(sums).tolist()
        return float(left / total)

    def _read(self) -> bool:
        numbers, mesh = self._units.plan.heldout_units, self._mesh
        if mesh.any_rank(not are_there(self._units, numbers)):
            return False
        rows = torch.cat(list(rows_of(self._units, numbers, mesh.world * self._rows)))
        own = rows[mesh.rank * len(rows) // mesh.world :][: len(rows) // mesh.world]
        self._x = own.to(mesh.device) * self._normaliser.scale
        return True
