"""Lineage of a run: the runs that it continues, and their progress."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from dist_sae.checkpoint.layout import Checkpoint

_KEY = "lineage"


class Ancestor(NamedTuple):
    """A run that another one continued."""

    run: str
    step: int
    """Step of the checkpoint that its child started from."""
    rows: int
    """Rows trained on by then, without those of its own ancestors."""
    state: bool
    """True if the child took the optimiser's state, False if only the weights."""


class Lineage(NamedTuple):
    """Training by a run's ancestors before its first step; stored in checkpoints."""

    ancestors: tuple[Ancestor, ...] = ()
    """Ancestors, oldest first."""
    updates: int = 0
    """Updates in Adam's state."""
    counted_rows: int = 0
    """Rows over which latents' idle rows were counted."""
    stream_rows: int = 0
    """Rows taken from each stream of the activation set."""

    @property
    def rows(self) -> int:
        """Rows that all ancestors trained on."""
        return sum(ancestor.rows for ancestor in self.ancestors)

    def totals(self, rows: int) -> Mapping[str, float]:
        """Rows that the run has trained on, alone and (if it has ancestors) with theirs."""
        return {"rows": rows} | ({"rows_with_parents": self.rows + rows} if self.ancestors else {})

    def to_scalars(self) -> dict[str, Any]:
        """Convert to a checkpoint's scalars; empty for a run without ancestors."""
        return {_KEY: self._asdict()} if self.ancestors else {}

    @classmethod
    def from_scalars(cls, scalars: Mapping[str, Any]) -> Self:
        """Read the lineage from a checkpoint's scalars; empty if there is none."""
        if _KEY not in scalars:
            return cls()
        ancestors = tuple(Ancestor(*fields) for fields in scalars[_KEY]["ancestors"])
        return cls(**{**scalars[_KEY], "ancestors": ancestors})

    @classmethod
    def of_child(cls, parent: Checkpoint, *, state: bool, streams: int | None) -> Self:
        """Lineage of a run that continues from a checkpoint.

        Args:
            parent: The checkpoint.
            state: Whether the child takes the optimiser's state.
            streams: Number of streams if the child reads on where the parent stopped, else None.
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
        """Describe the ancestors and their rows, for a report."""
        return ", ".join(
            f"{run} to step {step:,} ({rows:,} rows; {'with' if state else 'without'} Adam's state)"
            for run, step, rows, state in self.ancestors
        )
