"""The batches that a rank trains on, shared by all jobs that read the same stream."""

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
"""Maximum bytes of first batches that a rank keeps in memory if only one job starts from them."""


class StreamPosition(NamedTuple):
    """Position of this rank in the stream, as a checkpoint stores it."""

    step: int
    """Batches taken."""
    cursors: Mapping[int, StreamCursor]
    """Position of each of this rank's streams."""
    repeated_rows: int
    """Rows that were read again because a stream had ended.

    Rank 0's count also includes the total of all ranks in the checkpoint that was restored.
    """

    def after(self, batch: Batch) -> "StreamPosition":
        """Return the position after the next batch."""
        repeated_rows = self.repeated_rows + batch.repeated_rows
        return StreamPosition(batch.step + 1, batch.cursors, repeated_rows)


class TrainingBatch:
    """This rank's part of a global batch.

    Args:
        loaded: The batch from the loader.
        device: This rank's device.
        needs_sync: Returns whether this rank must synchronize with the others before the next
            batch.
    """

    def __init__(self, loaded: Batch, device: torch.device, needs_sync: Callable[[], bool]) -> None:
        self.loaded = loaded
        self.needs_sync = needs_sync
        self._sync_needed: list[bool] = []
        self._device = device
        self._rows: dict[Hashable, Rows] = {}

    def rows(self, normalisers: SiteNormalisers) -> Rows:
        """Return the rows of these sites on the device, normalized, in fp32.

        The rows are copied and normalized once, however many jobs use them.
        """
        key = normalisers.key
        if key not in self._rows:
            self._rows[key] = normalisers.rows(self.loaded.acts, self._device)
        return self._rows[key]

    def record_sync(self, *, needed: bool) -> None:
        """Record whether any rank must synchronize, which all ranks learned in a step."""
        self._sync_needed.append(needed)

    @property
    def synchronizes(self) -> bool:
        """Whether the ranks synchronize before the next batch.

        They also do if no step ran on this batch, because then no rank knows about the others.
        """
        return any(self._sync_needed) or not self._sync_needed


class Reader(Protocol):
    """The part of a training job that `Batches` uses."""

    position: StreamPosition
    registration: Registration
    """Publishes how far the job has read, for producers and other runs."""

    @property
    def steps(self) -> range:
        """The job's remaining steps, which are also the numbers of the batches that it needs."""


@dataclass(eq=False)
class Batches:
    """Iterates over the batches that the jobs still need, and exports metrics about loading.

    A batch is fetched once, however many jobs train on it. Reading starts at the position of the
    job that is furthest behind. Each of the other jobs skips batches until its own next step.

    Ranks synchronize before a batch only if one of them must stop or has no batch ready. All ranks
    learn this in a step on the previous batch: the flag is summed over ranks by the same all-reduce
    as the counts of dead latents. So all ranks stop after the same step, and a step starts without
    a collective if all ranks have their batches.
    """

    mesh: Mesh
    watch: Watch
    """Notified when this rank waits for a batch."""
    jobs: Sequence[Reader]
    open_loader: Callable[[range, Mapping[int, StreamCursor]], Loader]
    """Opens a loader for the batches of these steps, given the cursors of the first batch."""
    reading: ExitStack
    """Exit stack that closes the loader."""
    times: Times
    telemetry: Telemetry
    stopping: threading.Event
    """When set on any rank, the iteration ends on all."""
    loader: Loader | None = None
    """The open loader, if any. Its next batch is the first one that a job needs."""
    ready_units: int | None = None
    """Number of existing training units; None until they have been counted."""

    def __iter__(self) -> Iterator[TrainingBatch]:
        """Yield batches until no job needs one, or until a rank must stop. Collective."""
        while going := [job for job in self.jobs if job.steps]:
            position = min((job.position for job in going), key=lambda at: at.step)
            steps = range(position.step, max(job.steps.stop for job in going))
            if self.loader is None:
                self.reading.close()
                self.loader = self.reading.enter_context(self.open_loader(steps, position.cursors))
            loader, synchronizes = self.loader, True
            for step in steps:
                if not any(step in job.steps for job in self.jobs):
                    break  # the remaining jobs start at a later step: reopen the loader there
                self.times.step = step
                self.watch.set_step(step, working=False)
                self.telemetry.set("dist_sae_train_loaded_batches", loader.loaded)
                loaded = next_batch(
                    loader, self.mesh, self.stopping, self.times, synchronizes=synchronizes
                )
                if loaded is None:
                    return
                self._export(loaded)
                needs_sync = partial(self._needs_sync, loader, is_last=step == steps[-1])
                yield (batch := TrainingBatch(loaded, self.mesh.device, needs_sync))
                synchronizes = batch.synchronizes
            self.loader = None

    def _needs_sync(self, loader: Loader, *, is_last: bool) -> bool:
        return not is_last and (self.stopping.is_set() or not loader.is_ready)

    def raise_if_stopped(self) -> None:
        """Raise an error if the iteration ended before a job's last step.

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
        """The unit that the job furthest behind has reached."""
        return min(job.registration.reached for job in self.jobs)

    def show_ready(self, units: int) -> None:
        """Export how many training units exist. Called on rank 0, from a background thread."""
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
    """The first batches of the stream, from which new dictionaries are initialized.

    Batches are kept in memory for the other jobs and for training, which starts with them, so
    nothing is read twice. For a single job they are kept only up to `KEPT_BYTES`: a million latents
    need a million rows, which would take memory on top of what training needs.

    Args:
        n: Maximum number of batches.
        loader: Returns these batches, and then the following ones.
        several: Whether several jobs are initialized from them.
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
            DataExhaustedError: The activation set has too few rows.
        """
        for number in range(n):
            batch = self._kept[number] if number < len(self._kept) else self._take()
            yield normalisers.rows(batch.acts, self._mesh.device)

    def loader(self) -> Loader | None:
        """Return the loader, rewound to the first batch; None if the batches were not kept."""
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
    """Create a loader for this rank's share of the batches of these steps."""
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
    loader: Loader,
    mesh: Mesh,
    stopping: threading.Event,
    times: Times,
    *,
    synchronizes: bool = True,
) -> Batch | None:
    """Return the next batch once all ranks have theirs; None if any rank has none or must stop.

    Args:
        synchronizes: Whether the ranks synchronize; must be the same on all of them. If they do,
            all wait while one waits for its data. If they do not, every rank must have a batch
            ready.
    """
    batch = loader.next(times.report_wait)
    waited = batch.waited_seconds if batch else 0.0
    times.count_wait(waited)
    times.end("wait")
    if not synchronizes:
        assert batch is not None, "a rank without a batch requests synchronization"
        return batch
    ends, longest = mesh.any_rank_and_max(batch is None or stopping.is_set(), waited)
    times.end("ranks", waited=longest - waited)
    return None if ends else batch
