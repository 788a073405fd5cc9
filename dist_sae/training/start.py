"""What a run begins from: its own checkpoints, another run's, or rows alone."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

from dist_sae.checkpoint import warm_start
from dist_sae.checkpoint.layout import Checkpoint
from dist_sae.checkpoint.lineage import Lineage
from dist_sae.config import Run
from dist_sae.data.consumers import check_ahead, lowest_unit
from dist_sae.data.plan import Plan, check_rows
from dist_sae.data.streams import StreamCursor
from dist_sae.storage import ObjectStore


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


def cursors_of(checkpoint: Checkpoint) -> dict[int, StreamCursor]:
    """Where the streams are, by number."""
    return {int(v): StreamCursor(*cursor) for v, cursor in checkpoint.scalars["places"].items()}
