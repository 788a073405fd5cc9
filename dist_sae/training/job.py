"""A training job: one dictionary, its optimiser, its checkpoints and its numbers."""

from collections.abc import Callable
from types import TracebackType
from typing import Self

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
    context = StepContext(variance, dead.mask, dead.count, progress)
    output = engine.objective(rows, context)
    end_phase("forward")
    engine.backward(output.terms.total)
    end_phase("backward")
    gradient_norm = engine.step(lr)
    end_phase("optimiser")
    dead.update(output.fired, batch_rows)
    if dead.n_stuck:
        engine.revive(dead.stuck, rows.inputs, output.error)
    if average is not None:
        average.update(rows, progress)
    return output, gradient_norm


class TrainingJob:
    """One dictionary in training. A context manager.

    Several jobs may read the same batches; what they share is in `Batches`.

    Args:
        run: The run, resolved.
        mesh: This rank and its process groups.
        watch: Learns when this rank saves, which may take long.
        engine: The dictionary's optimiser.
        state: The dictionary, its dead latents and its average.
        variance: The data set's, normalised.
        lineage: The runs before this one.
        report: Publishes the numbers.
        heldout: Measures FVU on held-out rows.
        saver: Saves checkpoints.
        step: Steps done already.
    """

    def __init__(
        self,
        run: Run,
        mesh: Mesh,
        watch: Watch,
        *,
        engine: Engine,
        state: TrainingState,
        variance: float,
        lineage: Lineage,
        report: TrainingReporter,
        heldout: HeldoutFvu,
        saver: Saver,
        step: int,
    ) -> None:
        self._run = run
        self._mesh = mesh
        self._watch = watch
        self._engine = engine
        self._state = state
        self._variance = variance
        self._lineage = lineage
        self._report = report
        self._heldout = heldout
        self._saver = saver
        self._step = step

    def __enter__(self) -> Self:
        self._report.__enter__()
        self._saver.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._saver.__exit__(kind, error, trace)
        finally:
            self._report.__exit__(kind, error, trace)

    def step(self, batch: TrainingBatch) -> None:
        """Train on a batch, report, and save if a checkpoint is due. Collective."""
        run, train, done = self._run, self._run.train, self._step
        lr = learning_rate(
            done,
            run.steps,
            peak=run.lr,
            warmup_steps=train.warmup_steps,
            decay_share=train.decay_share,
        )
        output, gradient_norm = training_step(
            batch.rows,
            self._engine,
            self._state.dead,
            self._state.average,
            batch_rows=train.batch_rows,
            variance=self._variance,
            progress=done / run.steps,
            lr=lr,
            end_phase=self._report.end,
        )
        self._step = done + 1
        self._report.step(self._step, batch.rows, output, lr=lr, gradient_norm=gradient_norm)
        if self._step % train.save_every_steps == 0:
            self._save(batch.position)

    def finish(self, position: StreamPosition) -> None:
        """Save the last step and wait until it is durable. Collective."""
        self._save(position)
        self._saver.finish()

    def result(self) -> dict[str, float]:
        """Steps and rows trained on, and the last numbers reported."""
        rows = self._step * self._run.train.batch_rows
        return {"step": self._step, **self._lineage.totals(rows), **self._report.last}

    def _save(self, position: StreamPosition) -> None:
        """Measure on held-out rows and start to save, unless this step is saved already."""
        if self._step == self._saver.last_step:
            return
        self._watch.at(self._step, working=False)
        sae = self._state.sae
        check_replicated(self._mesh, sae.replicated)
        fvu = self._heldout.measure(self._state)
        self._report.heldout(self._step, fvu)
        repeated = sum(self._mesh.all_gather_objects(position.repeated_rows))
        self._saver.save(self._step, position.cursors, heldout_fvu=fvu, repeated_rows=repeated)
        self._report.end("save")
