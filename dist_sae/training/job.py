"""A training job: one dictionary with its optimizer, checkpoints and metrics."""

from collections.abc import Callable
from dataclasses import dataclass

from dist_sae.checkpoint.lineage import Lineage
from dist_sae.checkpoint.saver import Saver
from dist_sae.checkpoint.state import TrainingState
from dist_sae.config import Run
from dist_sae.data.consumers import Registration
from dist_sae.dictionaries.dead import DeadLatents
from dist_sae.dictionaries.ema import WeightAverage
from dist_sae.dictionaries.interface import Output, Rows, StepContext
from dist_sae.dictionaries.normaliser import SiteNormalisers
from dist_sae.dictionaries.schedules import learning_rate
from dist_sae.distributed.engine import Engine
from dist_sae.distributed.mesh import Mesh, check_replicated
from dist_sae.distributed.watch import Watch
from dist_sae.errors import NonFiniteError
from dist_sae.training.batches import StreamPosition, TrainingBatch
from dist_sae.training.heldout import HeldoutFvu
from dist_sae.training.reporter import TrainingReporter


def training_step(
    rows: Rows,
    engine: Engine,
    dead: DeadLatents,
    average: WeightAverage | None = None,
    *,
    batch_rows: int,
    variance: float,
    progress: float,
    lr: float,
    end_phase: Callable[[str], None],
    needs_sync: Callable[[], bool] = lambda: False,
) -> tuple[Output, float, bool]:
    """Run forward, backward and optimizer; update dead latents and running average. Collective.

    Args:
        rows: This rank's rows, normalized.
        engine: Computes the objective and updates the parameters.
        dead: Counts the rows since each latent last fired.
        average: Running average of the weights, if there is one.
        batch_rows: Rows of the global batch.
        variance: Variance of the data set's targets, in the scale of the rows.
        progress: Share of the run's steps that are done.
        lr: Learning rate.
        end_phase: Called with `forward`, `backward` and `optimiser` as each phase ends.
        needs_sync: Returns whether this rank must synchronize with the others before the next
            batch.

    Returns:
        The objective's output, the norm of the gradient before clipping, and whether any rank must
        synchronize. All ranks learn the last one without an extra collective.

    Raises:
        NonFiniteError: The gradient is not finite. The weights are unchanged.
    """
    context = StepContext(variance, dead.mask, dead.count, progress, dead.counts_by_layer)
    output = engine.objective(rows, context)
    end_phase("forward")
    engine.backward(output.terms.total)
    end_phase("backward")
    numbers = dead.update(output.fired, batch_rows, extra=int(needs_sync()))
    gradient_norm, *counts, need_sync = engine.step(lr, numbers)
    dead.counted(counts)
    end_phase("optimiser")
    if dead.n_stuck:
        engine.revive(dead.stuck, rows.inputs, output.error)
    if average is not None:
        average.update(rows, progress)
    return output, gradient_norm, need_sync > 0


@dataclass(eq=False)
class TrainingJob:
    """One dictionary in training. Jobs that read the same batches share `Batches`."""

    run: Run
    mesh: Mesh
    watch: Watch
    """Notified of each step and each save, because a long save must not look like a hung step."""
    engine: Engine
    state: TrainingState
    """The dictionary, its dead latents and its running average."""
    normalisers: SiteNormalisers
    registration: Registration
    """Publishes how far the job has read, for producers and other runs."""
    lineage: Lineage
    """The ancestors of this run."""
    report: TrainingReporter
    heldout: HeldoutFvu
    saver: Saver
    position: StreamPosition
    alone: bool = True
    """Whether the job is outside a sweep. If so, its failure is raised immediately."""
    failure: NonFiniteError | None = None
    """Why the job ended before its last step."""

    @property
    def steps(self) -> range:
        """The remaining steps; empty after a failure."""
        done = self.position.step
        return range(done, done if self.failure else self.run.steps)

    def step(self, batch: TrainingBatch) -> None:
        """Train on a batch, report, and save if a checkpoint is due. Collective.

        Does nothing if the batch does not belong to the job's next step. A loss or gradient that is
        not finite ends the job and leaves the weights unchanged.
        """
        if self.failure:  # producers must not wait for this job, though it may be restarted later
            self.registration.advance(batch.loaded.cursors)
        if batch.loaded.step not in self.steps[:1]:
            return
        self.watch.set_step(self.position.step, working=True)
        self.registration.advance(batch.loaded.cursors)
        rows = batch.rows(self.normalisers)
        self.report.end("rest")
        try:
            self._train(batch, rows)
        except NonFiniteError as exc:
            if self.alone:
                raise
            self.failure = exc
            self.report.failed(exc)

    def _train(self, batch: TrainingBatch, rows: Rows) -> None:
        run, train, done = self.run, self.run.train, self.position.step
        lr = learning_rate(
            done,
            run.steps,
            peak=run.lr,
            warmup_steps=train.warmup_steps,
            decay_share=train.decay_share,
        )
        output, gradient_norm, sync_needed = training_step(
            rows,
            self.engine,
            self.state.dead,
            self.state.average,
            batch_rows=train.batch_rows,
            variance=self.normalisers.variance,
            progress=done / run.steps,
            lr=lr,
            end_phase=self.report.end,
            needs_sync=batch.needs_sync,
        )
        batch.record_sync(needed=sync_needed)
        self.position = after = self.position.after(batch.loaded)
        self.report.step(after.step, rows, output, lr=lr, gradient_norm=gradient_norm)
        if after.step % train.save_every_steps == 0 or not self.steps:
            self._save()

    def finish(self) -> None:
        """Save the last step, except after a failure, and wait for all saves. Collective."""
        if not self.failure:
            self._save()
        self.saver.finish()
        if not (self.alone or self.steps):
            self.report.telemetry.ended()

    def result(self) -> dict[str, float]:
        """Return the steps and rows trained on, and the last metrics reported."""
        done = self.position.step
        rows = done * self.run.train.batch_rows
        return {"step": done, **self.lineage.totals(rows), **self.report.last}

    def _save(self) -> None:
        """Measure the held-out FVU and start a save, unless this step is already saved."""
        done, cursors, repeated_here = self.position
        if done == self.saver.last_step:
            return
        self.watch.set_step(done, working=False)
        check_replicated(self.mesh, self.state.sae.replicated)
        fvu = self.heldout.measure(self.state)
        self.report.heldout(done, fvu)
        repeated = sum(self.mesh.all_gather_objects(repeated_here, int))
        self.saver.save(done, cursors, heldout_fvu=fvu, repeated_rows=repeated)
        self.report.end("save")
