"""A training job: one dictionary, its optimiser, its checkpoints and its numbers."""

from collections.abc import Callable
from dataclasses import dataclass

from dist_sae.checkpoint.lineage import Lineage
from dist_sae.checkpoint.saver import Saver
from dist_sae.checkpoint.state import TrainingState
from dist_sae.config import Run
from dist_sae.dictionaries.dead import DeadLatents
from dist_sae.dictionaries.ema import WeightAverage
from dist_sae.dictionaries.interface import Output, Rows, StepContext
from dist_sae.dictionaries.schedules import learning_rate
from dist_sae.distributed.engine import Engine
from dist_sae.distributed.mesh import Mesh, check_replicated
from dist_sae.distributed.watch import Watch
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
) -> tuple[Output, float]:
    """Forward, backward, optimiser, dead latents, running average. Collective.

    Args:
        rows: This rank's rows, normalised.
        engine: Computes the objective and updates the parameters.
        dead: Counts idle rows of each latent.
        average: Running average of the weights, if there is one.
        batch_rows: Rows of the global batch.
        variance: The data set's, in the scale of the rows.
        progress: Share of the run's steps that are done.
        lr: Learning rate.
        end_phase: Called with `forward`, `backward` and `optimiser` as each of them ends.

    Returns:
        The objective's output, and the norm of the gradient before clipping.

    Raises:
        NonFiniteError: The gradient is not finite; the weights are as before.
    """
    context = StepContext(variance, dead.mask, dead.count, progress, dead.count_here)
    output = engine.objective(rows, context)
    end_phase("forward")
    engine.backward(output.terms.total)
    end_phase("backward")
    gradient_norm, *counts = engine.step(lr, dead.update(output.fired, batch_rows))
    dead.counted(counts)
    end_phase("optimiser")
    if dead.n_stuck:
        engine.revive(dead.stuck, rows.inputs, output.error)
    if average is not None:
        average.update(rows, progress)
    return output, gradient_norm


@dataclass(eq=False)
class TrainingJob:
    """One dictionary in training. Jobs that read the same batches share `Batches`."""

    run: Run
    mesh: Mesh
    watch: Watch
    """Learns when this rank saves, which may take long."""
    engine: Engine
    state: TrainingState
    """The dictionary, its dead latents and its average."""
    variance: float
    """The data set's, normalised."""
    lineage: Lineage
    """The runs before this one."""
    report: TrainingReporter
    heldout: HeldoutFvu
    saver: Saver
    steps_done: int

    def step(self, batch: TrainingBatch) -> None:
        """Train on a batch, report, and save if a checkpoint is due. Collective."""
        run, train, done = self.run, self.run.train, self.steps_done
        lr = learning_rate(
            done,
            run.steps,
            peak=run.lr,
            warmup_steps=train.warmup_steps,
            decay_share=train.decay_share,
        )
        output, gradient_norm = training_step(
            batch.rows,
            self.engine,
            self.state.dead,
            self.state.average,
            batch_rows=train.batch_rows,
            variance=self.variance,
            progress=done / run.steps,
            lr=lr,
            end_phase=self.report.end,
        )
        self.steps_done = done + 1
        self.report.step(self.steps_done, batch.rows, output, lr=lr, gradient_norm=gradient_norm)
        if self.steps_done % train.save_every_steps == 0:
            self._save(batch.position)

    def finish(self, position: StreamPosition) -> None:
        """Save the last step and wait until it is durable. Collective."""
        self._save(position)
        self.saver.finish()

    def result(self) -> dict[str, float]:
        """Steps and rows trained on, and the last numbers reported."""
        rows = self.steps_done * self.run.train.batch_rows
        return {"step": self.steps_done, **self.lineage.totals(rows), **self.report.last}

    def _save(self, position: StreamPosition) -> None:
        """Measure on held-out rows and start to save, unless this step is saved already."""
        if self.steps_done == self.saver.last_step:
            return
        self.watch.at(self.steps_done, working=False)
        check_replicated(self.mesh, self.state.sae.replicated)
        fvu = self.heldout.measure(self.state)
        self.report.heldout(self.steps_done, fvu)
        repeated = sum(self.mesh.all_gather_objects(position.repeated_rows, int))
        self.saver.save(self.steps_done, position.cursors, heldout_fvu=fvu, repeated_rows=repeated)
        self.report.end("save")
