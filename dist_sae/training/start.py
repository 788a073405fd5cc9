"""What a run begins from: its own checkpoints, another run's, or rows alone."""

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

from dist_sae.checkpoint import warm_start
from dist_sae.checkpoint.layout import Checkpoint, Checkpoints
from dist_sae.checkpoint.lineage import Lineage
from dist_sae.checkpoint.state import TrainingState
from dist_sae.config import Run
from dist_sae.config.fingerprint import check_same_run
from dist_sae.data.consumers import check_ahead, lowest_unit
from dist_sae.data.plan import Plan, check_rows
from dist_sae.data.streams import StreamCursor
from dist_sae.distributed.mesh import Mesh
from dist_sae.errors import CorruptObjectError, ObjectNotFoundError, PlanMismatchError, Stopped
from dist_sae.storage import ObjectStore
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.training.batches import StreamPosition

logger = logging.getLogger(__name__)


class Start(NamedTuple):
    """Checkpoints to begin from: the run's own, or its parent's."""

    found: Sequence[Checkpoint] = ()
    """Its own checkpoints, the newest first."""
    parent: Checkpoint | None = None
    """Where there are none: that of another run."""
    lineage: Lineage = Lineage()
    cursors: Mapping[int, StreamCursor] = {}
    """Where its streams are, or its parent's were if they are gone on with."""

    @classmethod
    def of_own(cls, found: Sequence[Checkpoint]) -> Self:
        """That of a run which has checkpoints."""
        return cls(
            found, lineage=Lineage.from_scalars(found[0].scalars), cursors=cursors_of(found[0])
        )

    @classmethod
    def of_others(cls, runs: ObjectStore, run: Run, plan: Plan) -> Self:
        """That of a run which has none.

        Args:
            runs: The store of runs.
            run: As its file says.
            plan: Its plan.

        Raises:
            ConfigError: It cannot begin with its parent, or there is none.
            PlanMismatchError: The parent was trained on another activation set.
            CorruptObjectError: It is damaged.
        """
        parent, how = warm_start.find(runs, plan.resolve(run), plan.hash), run.train.parent
        if parent is None:
            return cls()
        reads_on = how is not None and how.data == "continue"
        lineage = Lineage.of_child(
            parent,
            state=how is not None and how.state,
            streams=plan.streams if reads_on else None,
        )
        return cls((), parent, lineage, cursors_of(parent) if reads_on else {})

    def resolve(self, run: Run, plan: Plan) -> Run:
        """`Plan.resolve`, which gives a child what its parents left."""
        return plan.resolve(run, self.lineage.stream_rows)

    def taken_rows(self, plan: Plan) -> int:
        """Rows of the activation set that its parents took."""
        return self.lineage.stream_rows * plan.streams

    def init_rows(self, run: Run) -> int:
        """Rows that the initial dictionary wants directions from."""
        if self.found:
            return 0
        if self.parent is None:
            return run.sae.init_rows
        return run.sae.n_latents - warm_start.width(self.parent)  # at what is left of a row

    def knows_rows_of(self, plan: Plan) -> Checkpoint | None:
        """The checkpoint that has the plan's normaliser, if there is one."""
        known = self.found[0] if self.found else self.parent
        return known if known and known.scalars.get("plan") == plan.hash else None

    def check(self, run: Run, plan: Plan) -> None:
        """Make sure that the activation set has what the run is going to read.

        Args:
            run: The run, resolved.
            plan: Its plan.

        Raises:
            DataExhaustedError: `train.rows` is above what is left.
            ConfigError: Producers would be held back before training has what it begins with.
        """
        check_rows(run, plan, self.taken_rows(plan))
        normaliser_rows = 0 if self.knows_rows_of(plan) else run.train.normaliser_rows or 0
        first = lowest_unit(plan, self.cursors, keeps=run.train.max_passes > 1)
        check_ahead(run, plan, max(normaliser_rows, self.init_rows(run)), first)


def find_start(
    runs: ObjectStore, run: Run, plan: Plan, checkpoints: Checkpoints, mesh: Mesh
) -> Start:
    """Find what the run starts from: the same on all ranks. Collective.

    Raises:
        Stopped: The ranks found different checkpoints of the parent.
    """
    if found := find_checkpoints(checkpoints, runs, run, plan, mesh):
        return Start.of_own(found)
    start = Start.of_others(runs, run, plan)
    if len(set(mesh.all_gather_objects(start.parent and start.parent.step))) > 1:
        raise Stopped(f"{run.name}: its parent was written while the ranks began; start again")
    if start.parent:
        logger.info("goes on from %s", start.lineage.describe())
    return start


def find_checkpoints(
    checkpoints: Checkpoints, runs: ObjectStore, run: Run, plan: Plan, mesh: Mesh
) -> list[Checkpoint]:
    """Find the run's checkpoints that every rank can read, newest first. Collective.

    Raises:
        CorruptObjectError: There are checkpoints, but no manifest is intact.
        PlanMismatchError: They belong to other settings or to another activation set.
    """
    found = list(checkpoints.newest_first())
    on_all = set.intersection(*mesh.all_gather_objects({checkpoint.step for checkpoint in found}))
    found = [checkpoint for checkpoint in found if checkpoint.step in on_all]
    if not found and checkpoints.steps():
        raise CorruptObjectError(
            "no checkpoint is whole; restore one, or train under another name",
            url=runs.url,
            key=run.name,
        )
    windows = range(0, plan.n_train_units // plan.streams, plan.window_units)
    for checkpoint in found:
        remedy = (
            f"restore them, or choose another name: `--set name=OTHER --from {run.name}` goes on "
            f"from this run"
        )
        resolved = plan.resolve(run, Lineage.from_scalars(checkpoint.scalars).stream_rows)
        check_same_run(checkpoint.scalars["run"], resolved, f"{runs.url}/{run.name}", remedy)
        if checkpoint.scalars["plan"] != plan.hash or not all(
            stream < plan.streams and place.first in windows
            for stream, place in cursors_of(checkpoint).items()
        ):
            raise PlanMismatchError(
                f"{run.store.runs}/{run.name}: was trained on another activation set than "
                f"{run.store.activations}; restore store.activations or choose another name"
            )
    return found


def restore(
    state: TrainingState,
    found: Sequence[Checkpoint],
    checkpoints: Checkpoints,
    mesh: Mesh,
    telemetry: Telemetry,
) -> StreamPosition:
    """Load the first of these checkpoints that is intact for all ranks. Collective.

    Later ones are damaged; they are counted and deleted.

    Raises:
        CorruptObjectError: None is intact.
    """
    for checkpoint in found:
        damage: CorruptObjectError | ObjectNotFoundError | None = None
        try:
            take = state.read(checkpoint)
        except (CorruptObjectError, ObjectNotFoundError) as exc:
            damage = exc
        if mesh.any_rank(damage is not None):
            if damage is not None:
                logger.error("%s; the checkpoint before is taken", damage)
            continue
        take()
        if mesh.is_first:  # or they would be the newest again
            for step in checkpoints.steps():
                if step > checkpoint.step:
                    telemetry.add("dist_sae_checkpoint_damaged_total", 1)
                    checkpoints.delete(step)
        # streams differ in what they repeat; the total is counted on rank 0
        repeated_rows = checkpoint.scalars.get("repeated_rows", 0) if mesh.is_first else 0
        return StreamPosition(checkpoint.step, cursors_of(checkpoint), repeated_rows)
    raise CorruptObjectError(
        "no checkpoint is whole; restore one, or train under another name",
        url=checkpoint.store.url,
    )


def cursors_of(checkpoint: Checkpoint) -> dict[int, StreamCursor]:
    """Where the streams are, by number."""
    return {int(v): StreamCursor(*cursor) for v, cursor in checkpoint.scalars["places"].items()}
