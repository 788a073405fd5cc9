"""Finds what a run starts from: its own checkpoints, a parent's, or nothing."""

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

from dist_sae.checkpoint import warm_start
from dist_sae.checkpoint.layout import Checkpoint, Checkpoints
from dist_sae.checkpoint.lineage import Lineage
from dist_sae.checkpoint.state import TrainingState
from dist_sae.config import Run
from dist_sae.data.consumers import check_ahead, lowest_unit
from dist_sae.data.plan import Plan, check_rows
from dist_sae.data.streams import StreamCursor
from dist_sae.distributed.mesh import Mesh
from dist_sae.errors import (
    ConfigError,
    CorruptObjectError,
    ObjectNotFoundError,
    PlanMismatchError,
    Stopped,
)
from dist_sae.storage import ObjectStore
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.training.batches import StreamPosition
from dist_sae.training.completed import check_settings

logger = logging.getLogger(__name__)


class Start(NamedTuple):
    """Checkpoints that a run starts from: its own, or its parent's."""

    found: Sequence[Checkpoint] = ()
    """The run's own checkpoints, newest first."""
    parent: Checkpoint | None = None
    """The parent's checkpoint, if the run has none of its own."""
    lineage: Lineage = Lineage()
    cursors: Mapping[int, StreamCursor] = {}
    """Stream positions of the run, or of its parent if `train.parent.data` is `continue`."""

    @classmethod
    def from_own_checkpoints(cls, found: Sequence[Checkpoint]) -> Self:
        """Return the start of a run that has checkpoints."""
        return cls(
            found, lineage=Lineage.from_scalars(found[0].scalars), cursors=cursors_of(found[0])
        )

    @classmethod
    def from_parent(cls, runs: ObjectStore, run: Run, plan: Plan) -> Self:
        """Return the start of a run without checkpoints: a parent, converted weights, or nothing.

        Args:
            runs: The store of runs.
            run: The run, as written in its run file.
            plan: The plan of its activation set.

        Raises:
            ConfigError: The parent does not exist or does not fit.
            PlanMismatchError: The parent was trained on another activation set.
            CorruptObjectError: The parent's checkpoint is damaged.
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
        """Resolve the run by the plan, without the rows that its ancestors took."""
        return plan.resolve(run, self.lineage.stream_rows)

    def taken_rows(self, plan: Plan) -> int:
        """Return the number of rows of the activation set that the ancestors took."""
        return self.lineage.stream_rows * plan.streams

    def init_rows(self, run: Run) -> int:
        """Return the number of rows that give latents their initial directions."""
        if self.found:
            return 0
        if self.parent is None:
            return run.sae.init_rows
        return run.sae.n_latents - warm_start.width(self.parent)  # the parent has the others

    def normaliser_checkpoint(self, plan: Plan) -> Checkpoint | None:
        """Return a checkpoint whose normaliser was measured on this plan, if there is one."""
        known = self.found[0] if self.found else self.parent
        return known if known and known.scalars.get("plan") == plan.hash else None

    def check(self, run: Run, plan: Plan) -> None:
        """Check that the activation set has enough rows.

        Args:
            run: The resolved run.
            plan: The plan of its activation set.

        Raises:
            DataExhaustedError: `train.rows` exceeds the rows that are left.
            ConfigError: `store.max_ahead_units` would stop producers before training can start.
        """
        check_rows(run, plan, self.taken_rows(plan))
        normaliser_rows = 0 if self.normaliser_checkpoint(plan) else run.train.normaliser_rows or 0
        first = lowest_unit(plan, self.cursors, multi_pass=run.train.max_passes > 1)
        check_ahead(run, plan, max(normaliser_rows, self.init_rows(run)), first)


def find_start(
    runs: ObjectStore, run: Run, plan: Plan, checkpoints: Checkpoints, mesh: Mesh
) -> Start:
    """Find what the run starts from, which is the same on all ranks. Collective.

    Raises:
        Stopped: The ranks found different checkpoints of the parent.
    """
    if found := find_checkpoints(checkpoints, runs, run, plan, mesh):
        return Start.from_own_checkpoints(found)
    start = Start.from_parent(runs, run, plan)
    if len(set(mesh.all_gather_objects(start.parent and start.parent.step, int | None))) > 1:
        raise Stopped(
            f"{run.name}: a checkpoint of its parent was saved while the ranks started; start again"
        )
    if start.parent:
        logger.info("continuing from %s", start.lineage.describe())
    return start


def find_checkpoints(
    checkpoints: Checkpoints, runs: ObjectStore, run: Run, plan: Plan, mesh: Mesh
) -> list[Checkpoint]:
    """Find the run's checkpoints that every rank can read, newest first. Collective.

    Raises:
        CorruptObjectError: There are checkpoints, but no manifest is intact.
        PlanMismatchError: The checkpoints belong to other settings or another activation set.
        ConfigError: The run's folder contains an imported dictionary.
    """
    found = list(checkpoints.newest_first())
    steps = {checkpoint.step for checkpoint in found}
    on_all = set.intersection(*mesh.all_gather_objects(steps, set[int]))
    found = [checkpoint for checkpoint in found if checkpoint.step in on_all]
    if not found and checkpoints.steps():
        raise CorruptObjectError(
            "no checkpoint is intact; restore one, or train under another name",
            url=runs.url,
            key=run.name,
        )
    windows = range(0, plan.n_train_units // plan.streams, plan.window_units)
    for checkpoint in found:
        lineage = Lineage.from_scalars(checkpoint.scalars)
        check_settings(checkpoint, plan.resolve(run, lineage.stream_rows), runs)
        if not checkpoint.step:
            raise ConfigError(
                f"{runs.url}/{run.name}: contains an imported dictionary; to train it further, "
                f"use `--set name=OTHER --from {run.name}`"
            )
        if checkpoint.scalars["plan"] != plan.hash or not all(
            stream < plan.streams and place.first in windows
            for stream, place in cursors_of(checkpoint).items()
        ):
            raise PlanMismatchError(
                f"{run.store.runs}/{run.name}: was trained on a different activation set than "
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
    """Load the newest of these checkpoints that is intact on all ranks. Collective.

    Newer checkpoints are damaged, so they are counted and deleted.

    Raises:
        CorruptObjectError: No checkpoint is intact on all ranks.
    """
    for checkpoint in found:
        damage: CorruptObjectError | ObjectNotFoundError | None = None
        try:
            apply = state.read(checkpoint)
        except (CorruptObjectError, ObjectNotFoundError) as exc:
            damage = exc
        if mesh.any_rank(damage is not None):
            if damage is not None:
                logger.error("%s; using the previous checkpoint", damage)
            continue
        apply()
        if mesh.is_first:  # otherwise the next start would try the damaged ones first
            for step in checkpoints.steps():
                if step > checkpoint.step:
                    telemetry.add("dist_sae_checkpoint_damaged_total", 1)
                    checkpoints.delete(step)
        # stored as the total over ranks, so rank 0 alone continues the count
        repeated_rows = checkpoint.scalars.get("repeated_rows", 0) if mesh.is_first else 0
        return StreamPosition(checkpoint.step, cursors_of(checkpoint), repeated_rows)
    raise CorruptObjectError(
        "no checkpoint is intact; restore one, or train under another name",
        url=checkpoint.store.url,
    )


def cursors_of(checkpoint: Checkpoint) -> dict[int, StreamCursor]:
    """Return the stream positions in a checkpoint, by stream number."""
    return {int(v): StreamCursor(*cursor) for v, cursor in checkpoint.scalars["places"].items()}
