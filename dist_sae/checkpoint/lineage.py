"""The lineage of a run: the runs that it continues, and how far each was trained."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from dist_sae.checkpoint.layout import Checkpoint

_KEY = "lineage"


class Ancestor(NamedTuple):
    """A run that another run continued."""

    run: str
    step: int
    """Step of the checkpoint that the child started from."""
    rows: int
    """Number of rows trained on until that step, without the rows of its own ancestors."""
    state: bool
    """Whether the child took the optimizer's state in addition to the weights."""


class Lineage(NamedTuple):
    """The training that a run inherits from its ancestors. Stored in checkpoints."""

    ancestors: tuple[Ancestor, ...] = ()
    """The ancestors, oldest first."""
    updates: int = 0
    """Number of updates in the inherited Adam state."""
    counted_rows: int = 0
    """Number of rows over which the inherited idle rows were counted."""
    stream_rows: int = 0
    """Number of rows already taken from each stream of the activation set."""

    @property
    def rows(self) -> int:
        """Number of rows that all ancestors trained on."""
        return sum(ancestor.rows for ancestor in self.ancestors)

    def totals(self, rows: int) -> Mapping[str, float]:
        """Return the run's rows, and with ancestors also the total including their rows."""
        return {"rows": rows} | ({"rows_with_parents": self.rows + rows} if self.ancestors else {})

    def to_scalars(self) -> dict[str, Any]:
        """Convert to a checkpoint's scalars. Empty for a run without ancestors."""
        return {_KEY: self._asdict()} if self.ancestors else {}

    @classmethod
    def from_scalars(cls, scalars: Mapping[str, Any]) -> Self:
        """Read the lineage from a checkpoint's scalars. Empty if the run has no ancestors."""
        if _KEY not in scalars:
            return cls()
        ancestors = tuple(Ancestor(*fields) for fields in scalars[_KEY]["ancestors"])
        return cls(**{**scalars[_KEY], "ancestors": ancestors})

    @classmethod
    def of_child(cls, parent: Checkpoint, *, state: bool, streams: int | None) -> Self:
        """Build the lineage of a run that continues from a checkpoint.

        Args:
            parent: The checkpoint.
            state: Whether the child takes the optimizer's state.
            streams: Number of streams if the child continues reading where the parent stopped, else
                None.
        """
        before, settings = Lineage.from_scalars(parent.scalars), parent.scalars["run"]
        rows = parent.step * settings["train"]["batch_rows"]
        return cls(
            (*before.ancestors, Ancestor(settings["name"], parent.step, rows, state)),
            before.updates + parent.step if state else 0,
            before.counted_rows + rows if state else 0,
            before.stream_rows + rows // streams if streams else 0,
        )

    def describe(self) -> str:
        """Describe the ancestors and their rows for a report."""
        return ", ".join(
            f"{run} to step {step:,} ({rows:,} rows; {'with' if state else 'without'} Adam's state)"
            for run, step, rows, state in self.ancestors
        )
