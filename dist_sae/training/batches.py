"""The batches that a rank trains on: what all jobs that read one stream share."""

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch

from dist_sae.checkpoint.lineage import Lineage
from dist_sae.config import Run
from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.consumers import Registration
from dist_sae.data.loader import Batch, Loader
from dist_sae.data.streams import StreamCursor
from dist_sae.dictionaries.interface import Rows
from dist_sae.dictionaries.normaliser import SiteNormalisers
from dist_sae.distributed.mesh import Mesh
from dist_sae.distributed.watch import Watch
from dist_sae.errors import Stopped
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.training.clock import Times

_STALL_SECONDS = 0.01
KEPT_BYTES = 2**29
"""Most bytes of first batches that a rank keeps for training, unless jobs share them."""


class StreamPosition(NamedTuple):
    """Position of this rank in the stream, as a checkpoint stores it."""

    step: int
    """Batches taken."""
    cursors: Mapping[int, StreamCursor]
    """Position of each of this rank's streams."""
    repeated_rows: int
    """Rows read again because a stream had ended; rank 0's count includes earlier processes'."""

    def after(self, batch: Batch) -> "StreamPosition":
        """The position after the next batch."""
        repeated_rows = self.repeated_rows + batch.repeated_rows
        return StreamPosition(batch.step + 1, batch.cursors, repeated_rows)


class TrainingBatch:
    """This rank's part of a global batch.

    Args:
        loaded: As the loader gave it.
        device: This rank's.
        wants_to_meet: Tells whether this rank must meet the others before the next batch.
    """

    def __init__(
        self, loaded: Batch, device: torch.device, wants_to_meet: Callable[[], bool]
    ) -> None:
        self.loaded = loaded
        self.wants_to_meet = wants_to_meet
        self._said: list[bool] = []
        self._device = device
        self._rows: dict[Hashable, Rows] = {}

    def rows(self, normalisers: SiteNormalisers) -> Rows:
        """The rows of these sites on the device, normalised, in fp32.

        They are copied and normalised once, however many jobs ask.
        """
        key = normalisers.key
        if key not in self._rows:
            self._rows[key] = normalisers.rows(self.loaded.acts, self._device)
        return self._rows[key]

    def told(self, *, meet: bool) -> None:
        """Note whether any rank must meet the others, as a step on this batch has told all."""
        self._said.append(meet)

    @property
    def meets(self) -> bool:
        """Whether ranks meet before the next batch; also if no step on this one has told them."""
        return any(self._said) or not self._said


class Reader(Protocol):
    """What `Batches` knows of a job that reads them."""

    position: StreamPosition
    registration: Registration
    """Tells producers and other runs how far the job has read."""

    @property
    def steps(self) -> range:
        """Steps that the job will still make; it needs the batches of these numbers."""


@dataclass(eq=False)
class Batches:
    """Iterates over the batches that the jobs still need and exports how they arrive.

    A batch is fetched once, however many jobs train on it. Reading begins with the job that is
    furthest behind; the others join it where they stopped.

    Ranks meet before a batch only if one of them must stop, or has none at hand. They learn that in
    a step on the batch before, from a number that travels with its counts of dead latents. So all
    of them stop after the same step, and a step for which all batches are there begins at once.
    """

    mesh: Mesh
    watch: Watch
    """Learns that this rank waits for a batch."""
    jobs: Sequence[Reader]
    open_loader: Callable[[range, Mapping[int, StreamCursor]], Loader]
    """Opens a loader of the batches of these steps; the cursors are those of the first."""
    reading: ExitStack
    """Closes the loader."""
    times: Times
    telemetry: Telemetry
    stopping: threading.Event
    """When set on any rank, the iteration ends on all."""
    loader: Loader | None = None
    """The open loader, if there is one: it gives the batches from the first that a job needs."""
    ready_units: int | None = None
    """Training units that exist, once they have been counted."""

    def __iter__(self) -> Iterator[TrainingBatch]:
        """Yield batches until no job needs one, or until a rank must stop. Collective."""
        while going := [job for job in self.jobs if job.steps]:
            position = min((job.position for job in going), key=lambda at: at.step)
            steps = range(position.step, max(job.steps.stop for job in going))
            if self.loader is None:
                self.reading.close()
                self.loader = self.reading.enter_context(self.open_loader(steps, position.cursors))
            loader, meets = self.loader, True
            for step in steps:
                if not any(step in job.steps for job in self.jobs):
                    break  # those that are left begin further on
                self.times.step = step
                self.watch.at(step, working=False)
                self.telemetry.set("dist_sae_train_loaded_batches", loader.loaded)
                loaded = next_batch(loader, self.mesh, self.stopping, self.times, meets=meets)
                if loaded is None:
                    return
                self._export(loaded)
                wants_to_meet = partial(self._wants_to_meet, loader, is_last=step == steps[-1])
                yield (batch := TrainingBatch(loaded, self.mesh.device, wants_to_meet))
                meets = batch.meets
            self.loader = None

    def _wants_to_meet(self, loader: Loader, *, is_last: bool) -> bool:
        return not is_last and (self.stopping.is_set() or not loader.is_ready)

    def raise_if_stopped(self) -> None:
        """Raise why the iteration ended before the last step of a job, if it did.

        Raises:
            Stopped: A rank was asked to stop.
            DataExhaustedError: The activation set has too few rows.
        """
        left = [job.steps for job in self.jobs if job.steps]
        if left:
            assert self.loader is not None
            self.loader.raise_if_failed()
            first, last = min(steps.start for steps in left), max(steps.stop for steps in left)
            raise Stopped(f"stopped at step {first} of {last}; start again to continue")

    @property
    def reached(self) -> int:
        """Unit that reading has reached, for the job that is furthest behind."""
        return min(job.registration.reached for job in self.jobs)

    def show_ready(self, units: int) -> None:
        """Export how many training units exist. Called in a thread, on rank 0."""
        self.ready_units = units
        self.telemetry.set("dist_sae_train_ready_units", units)
        self._export_backlog()

    def _export(self, batch: Batch) -> None:
        add = self.telemetry.add
        add("dist_sae_train_loader_stalls_total", batch.waited_seconds > _STALL_SECONDS)
        add("dist_sae_train_repeated_rows_total", batch.repeated_rows)
        if self.mesh.is_first:
            self.telemetry.set("dist_sae_train_reached_units", self.reached)
            self._export_backlog()

    def _export_backlog(self) -> None:
        if self.ready_units is not None:
            backlog = max(0, self.ready_units - self.reached)
            self.telemetry.set("dist_sae_train_backlog_units", backlog)


class FirstBatches:
    """The first batches, from which new dictionaries take their initial values.

    They are kept in memory for the other jobs and for training, which begins with them, so nothing
    is read twice. Those of a single job are kept up to `KEPT_BYTES`: a million latents take as many
    rows, which would be memory on top of what training needs.

    Args:
        n: Number of batches, at most.
        loader: Gives them, and then those that follow.
        several: Whether several jobs begin with them.
    """

    def __init__(
        self,
        n: int,
        loader: Loader,
        mesh: Mesh,
        stopping: threading.Event,
        times: Times,
        *,
        several: bool,
    ) -> None:
        self._n = n
        self._loader = loader
        self._mesh = mesh
        self._stopping = stopping
        self._times = times
        self._several = several
        self._kept: list[Batch] = []
        self._taken = 0

    def rows(self, n: int, normalisers: SiteNormalisers) -> Iterator[Rows]:
        """Yield this rank's rows of the first n batches. Collective.

        Raises:
            Stopped: A stop was requested.
            DataExhaustedError: There are too few rows.
        """
        for number in range(n):
            batch = self._kept[number] if number < len(self._kept) else self._take()
            yield normalisers.rows(batch.acts, self._mesh.device)

    def loader(self) -> Loader | None:
        """The loader, which gives all batches from the first on; None if they were not kept."""
        if len(self._kept) < self._taken:
            return None
        self._loader.put_back(self._kept)
        return self._loader

    def _take(self) -> Batch:
        self._times.end("begin")
        batch = next_batch(self._loader, self._mesh, self._stopping, self._times)
        if batch is None:
            self._loader.raise_if_failed()
            raise Stopped("stopped before the first step; start again to continue")
        self._taken += 1
        n_bytes = self._n * sum(acts.nbytes for acts in batch.acts.values())
        if self._several or n_bytes <= KEPT_BYTES:
            self._kept.append(batch)
        return batch


def open_loader(
    run: Run,
    mesh: Mesh,
    activation_set: ActivationSet,
    steps: range,
    lineage: Lineage,
    cursors: Mapping[int, StreamCursor] | None,
) -> Loader:
    """This rank's share of the batches of these steps."""
    return Loader(
        activation_set,
        rank=mesh.rank,
        world=mesh.world,
        batch_rows=run.train.batch_rows,
        steps=steps,
        max_passes=run.train.max_passes,
        cursors=cursors,
        stream_rows=lineage.stream_rows,
        pinned=mesh.device.type == "cuda",
    )


def next_batch(
    loader: Loader, mesh: Mesh, stopping: threading.Event, times: Times, *, meets: bool = True
) -> Batch | None:
    """The next batch once all ranks have theirs; None if any rank has none or must stop.

    Args:
        meets: Whether the ranks meet; the same on all of them. While one waits for its data, all
            wait. Without meeting, every rank must have a batch at hand.
    """
    batch = loader.next(times.waiting)
    waited = batch.waited_seconds if batch else 0.0
    times.stood_still(waited)
    times.end("wait")
    if not meets:
        assert batch is not None, "a rank that has none asks to meet"
        return batch
    ends, longest = mesh.any_rank_and_max(batch is None or stopping.is_set(), waited)
    times.end("ranks", waited=longest - waited)
    return None if ends else batch
