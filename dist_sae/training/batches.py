"""The batches that a rank trains on: what all jobs that read one stream share."""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

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


class StreamPosition(NamedTuple):
    """Position of this rank in the stream, as a checkpoint stores it."""

    step: int
    """Batches taken."""
    cursors: Mapping[int, StreamCursor]
    """Position of each of this rank's streams."""
    repeated_rows: int
    """Rows read again because a stream had ended; rank 0's count includes earlier processes'."""


class TrainingBatch(NamedTuple):
    """This rank's part of a global batch."""

    rows: Rows
    """On the rank's device, normalised, in fp32."""
    position: StreamPosition
    """Position after this batch."""


@dataclass(eq=False)
class Batches:
    """Iterates over the batches of the run's remaining steps and exports how they arrive.

    A batch is fetched, copied and normalised once, however many jobs train on it.
    """

    run: Run
    mesh: Mesh
    watch: Watch
    """Learns whether this rank waits for a batch or trains on one."""
    loader: Loader
    normalisers: SiteNormalisers
    registration: Registration
    """Tells producers and other runs how far this run has read."""
    position: StreamPosition
    times: Times
    telemetry: Telemetry
    stopping: threading.Event
    """When set on any rank, the iteration ends on all."""
    ready_units: int | None = None
    """Training units that exist, once they have been counted."""

    def __iter__(self) -> Iterator[TrainingBatch]:
        """Yield batches until the last step, or until a rank must stop. Collective."""
        while (step := self.position.step) < self.run.steps:
            self.times.step = step
            self.watch.at(step, working=False)
            self.telemetry.set("dist_sae_train_loaded_batches", self.loader.loaded)
            batch = next_batch(self.loader, self.mesh, self.stopping, self.times)
            if batch is None:
                return
            self.watch.at(step, working=True)
            rows = self.normalisers.rows(batch.acts, self.mesh.device)
            repeated_rows = self.position.repeated_rows + batch.repeated_rows
            self.position = StreamPosition(step + 1, batch.cursors, repeated_rows)
            self.registration.at(batch.cursors)
            self._export(batch)
            self.times.end("rest")
            yield TrainingBatch(rows, self.position)

    def raise_if_stopped(self) -> None:
        """Raise why the iteration ended before the last step, if it did.

        Raises:
            Stopped: A rank was asked to stop.
            DataExhaustedError: The activation set has too few rows.
        """
        if self.position.step < self.run.steps:
            self.loader.raise_if_failed()
            raise Stopped(
                f"stopped at step {self.position.step} of {self.run.steps}; start again to continue"
            )

    def show_ready(self, units: int) -> None:
        """Export how many training units exist. Called in a thread, on rank 0."""
        self.ready_units = units
        self.telemetry.set("dist_sae_train_ready_units", units)
        self._export_backlog()

    def _export(self, batch: Batch) -> None:
        add = self.telemetry.add
        add("dist_sae_train_wait_seconds_total", batch.waited_seconds)
        add("dist_sae_train_loader_stalls_total", batch.waited_seconds > _STALL_SECONDS)
        add("dist_sae_train_repeated_rows_total", batch.repeated_rows)
        if self.mesh.is_first:
            self.telemetry.set("dist_sae_train_reached_units", self.registration.reached)
            self._export_backlog()

    def _export_backlog(self) -> None:
        if self.ready_units is not None:
            backlog = max(0, self.ready_units - self.registration.reached)
            self.telemetry.set("dist_sae_train_backlog_units", backlog)


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


def next_batch(loader: Loader, mesh: Mesh, stopping: threading.Event, times: Times) -> Batch | None:
    """The next batch once all ranks have theirs; None if any rank has none or must stop.

    Collective. While one rank waits for its data, all wait.
    """
    batch = loader.next(times.waiting)
    waited = batch.waited_seconds if batch else 0.0
    times.end("wait")
    ends, longest = mesh.any_rank_and_max(batch is None or stopping.is_set(), waited)
    times.end("ranks", waited=longest - waited)
    return None if ends else batch
