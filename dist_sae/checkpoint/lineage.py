"""Where a run comes from: the runs before it, and how far they had come."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from dist_sae.checkpoint.layout import Checkpoint

_KEY = "lineage"


class Ancestor(NamedTuple):
    """A run that another one went on from."""

    run: str
    step: int
    """Step of the checkpoint that its child began with."""
    rows: int
    """Rows that it had trained on by then, without those of its own ancestors."""
    state: bool
    """Whether the optimiser's state went on too, or the weights alone."""


class Lineage(NamedTuple):
    """Training done by a run's ancestors before its first step; a checkpoint carries it."""

    ancestors: tuple[Ancestor, ...] = ()
    """The oldest first."""
    updates: int = 0
    """Updates that Adam's state has seen."""
    counted_rows: int = 0
    """Rows over which idle rows of latents were counted."""
    stream_rows: int = 0
    """Rows that were taken from each stream of the activation set."""

    @property
    def rows(self) -> int:
        """Rows that the ancestors trained on, one after the other."""
        return sum(ancestor.rows for ancestor in self.ancestors)

    def totals(self, rows: int) -> Mapping[str, float]:
        """`rows` that the run has trained on, and with those of its ancestors if it has any."""
        return {"rows": rows} | ({"rows_with_parents": self.rows + rows} if self.ancestors else {})

    def to_scalars(self) -> dict[str, Any]:
        """For a checkpoint; nothing for a run without ancestors."""
        return {_KEY: self._asdict()} if self.ancestors else {}

    @classmethod
    def from_scalars(cls, scalars: Mapping[str, Any]) -> Self:
        """The lineage in a checkpoint; an empty one where there is none."""
        if _KEY not in scalars:
            return cls()
        ancestors = tuple(Ancestor(*fields) for fields in scalars[_KEY]["ancestors"])
        return cls(**{**scalars[_KEY], "ancestors": ancestors})

    @classmethod
    def of_child(cls, parent: Checkpoint, *, state: bool, streams: int | None) -> Self:
        """That of a run which goes on from a checkpoint.

        Args:
            parent: The checkpoint.
            state: Whether the optimiser's state goes on.
            streams: Of the activation set that is read on from there; None: it is begun anew.
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
        """The ancestors and their rows, for a report."""
        return ", ".join(
            f"{run} to step {step:,} ({rows:,} rows; {'with' if state else 'without'} Adam's state)"
            for run, step, rows, state in self.ancestors
        )
