"""`dist-sae index`: one of any number of workers that build a latent index together.

Stage 1 encodes units and stage 2 merges buckets. Workers claim both from a work queue, so they may
start, stop and die at any time. The result depends only on the checkpoint and the activation set.
"""

import gc
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from dist_sae import logs
from dist_sae.config import Run
from dist_sae.data.consumers import retired_below
from dist_sae.data.work_queue import QueueMetrics, Work, Worker, WorkQueue
from dist_sae.distributed.mesh import Mesh, join_mesh, single_process
from dist_sae.distributed.rendezvous import rendezvous
from dist_sae.distributed.watch import Watch
from dist_sae.errors import CorruptObjectError, ObjectNotFoundError, Stopped
from dist_sae.index.cells import load_or_compute_cells
from dist_sae.index.coactive import Sample
from dist_sae.index.context import IndexContext, open_index
from dist_sae.index.encode import Encoded, Encoder, open_encoder
from dist_sae.index.layout import UnitRecord
from dist_sae.index.outputs import open_outputs
from dist_sae.index.records import UnitRecords, unit_records
from dist_sae.index.repair import check_not_retired, delete_unreferenced, drop_damaged
from dist_sae.index.summary import summary
from dist_sae.index.tables import Origins, build_bucket
from dist_sae.index.units import UnitWriter
from dist_sae.index.weights import open_decoder, weight_columns
from dist_sae.storage.records import seal
from dist_sae.telemetry.exporter import Telemetry

logger = logging.getLogger(__name__)

_TAKEOVERS = "dist_sae_index_takeovers_total"
_WAITED = "dist_sae_index_waited_seconds_total"
_UNIT_METRICS = QueueMetrics(
    claimed="dist_sae_index_claimed_units",
    done="dist_sae_index_units",
    takeovers=_TAKEOVERS,
    waited_seconds=_WAITED,
    others="units",
)
_BUCKET_METRICS = QueueMetrics(
    claimed="dist_sae_index_claimed_buckets",
    done="dist_sae_index_buckets",
    takeovers=_TAKEOVERS,
    waited_seconds=_WAITED,
    others="buckets",
)


def index(
    run: Run,
    worker: Worker,
    stopping: threading.Event,
    telemetry: Telemetry,
    step: int | None = None,
    *,
    repair: bool = False,
) -> dict[str, Any]:
    """Build the index of a checkpoint, together with any other workers.

    Args:
        run: The run.
        worker: This worker. If `index.latent_shards` is above 1, all of its ranks are one worker.
        stopping: When set, the worker abandons its current unit or bucket.
        telemetry: Receives the metrics.
        step: Step of the checkpoint; None takes the newest.
        repair: Check every existing object, and rebuild the damaged ones.

    Returns:
        The `summary` of the whole index on the first rank, an empty dict on the others.

    Raises:
        ConfigError: There is no checkpoint, or an index of this name has other settings.
        PlanMismatchError: The run was trained with other settings, or on another activation set.
        Stopped: `stopping` was set before the index was complete.
    """
    context = open_index(run, worker.name, stopping, telemetry, step)
    with _join(run, stopping) as (mesh, watch):
        telemetry.device = mesh.device
        if repair and mesh.is_first:
            retired = retired_below(context.activations)
            drop_damaged(context.store, context.folder, context.manifest, retired)
        mesh.barrier()
        _Worker(context, worker, mesh, watch, stopping, telemetry).work()
        return summary(context.store, context.folder, context.manifest) if mesh.is_first else {}


@contextmanager
def _join(run: Run, stopping: threading.Event) -> Iterator[tuple[Mesh, Watch | None]]:
    """Join the ranks of this worker; yield their mesh and watch (None for a single rank)."""
    shards = run.index.latent_shards
    if shards == 1:
        yield single_process(), None
        return
    timeouts = run.timeouts
    with (
        rendezvous(
            shards,
            timeouts.missing_seconds,
            stopping,
            setting="index.latent_shards",
            name=f"{run.name}-index",
        ) as ranks,
        Watch(
            ranks, stopping, lost_seconds=timeouts.lost_seconds, hung_seconds=timeouts.hung_seconds
        ) as watch,
        join_mesh(ranks, shards) as mesh,
    ):
        yield mesh, watch


class _Pace:
    """A worker's pace, measured from the end of one piece of work to the end of the next."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def of(self, amount: int) -> float:
        """Return the amount done per second since the last call, including time spent waiting."""
        began, self._since = self._since, time.monotonic()
        return amount / max(self._since - began, 1e-9)


class _Worker:
    """A worker of one or more ranks, which work together in stage 1 and separately in stage 2."""

    def __init__(
        self,
        context: IndexContext,
        worker: Worker,
        mesh: Mesh,
        watch: Watch | None,
        stopping: threading.Event,
        telemetry: Telemetry,
    ) -> None:
        self._context = context
        self._worker = worker
        self._mesh = mesh
        self._watch = watch
        self._stopping = stopping
        self._telemetry = telemetry
        self._done = 0
        self._pace = _Pace()
        telemetry.set("dist_sae_index_plan_units", len(context.manifest.units))
        telemetry.set("dist_sae_index_plan_buckets", context.manifest.n_buckets)

    def work(self) -> None:
        """Work until the index is complete.

        Raises:
            Stopped: `stopping` was set before the index was complete.
        """
        store, folder, manifest, *_ = self._context
        buckets = list(range(manifest.n_buckets))
        whole = False
        while not whole:
            self._encode_units()
            whole = not self._mesh.any_rank(not self._merge_buckets(buckets))
        if self._mesh.is_first:
            delete_unreferenced(store, folder, manifest)
        self._mesh.barrier()

    def _encode_units(self) -> None:
        """Run stage 1: encode units until all are encoded."""
        context, mesh = self._context, self._mesh
        folder, manifest = context.folder, context.manifest
        work = Work("unit", manifest.units, folder.unit_claims, folder.units, metrics=_UNIT_METRICS)
        with self._queue(work, self._worker, lead=True) as queue, ExitStack() as closing:
            sealed = partial(self._release, queue)
            writer = closing.enter_context(
                UnitWriter(context.store, folder, manifest, mesh, sealed)
            )
            encoder: Encoder | None = None
            claimed: int | None = None
            is_pending = False

            def claim_next() -> int | None:
                nonlocal claimed
                claimed = self._next_unit(queue, wait=False)
                return claimed

            while True:
                unit, claimed = self._next_unit(queue, claimed, wait=not is_pending), None
                if unit is None:  # others work on all remaining units, or none remain
                    if not is_pending:
                        break
                    writer.finish()
                    is_pending = False
                    continue
                if encoder is None:
                    self._telemetry.life.begin()
                    encoder = open_encoder(context, mesh.axis, mesh.device, self._stopping)
                    closing.enter_context(encoder)
                    self._pace = _Pace()
                encoded = self._encode(encoder, unit, claim_next)
                if encoded is None:
                    self._skip_unit(unit, queue)
                    continue
                writer.put(encoded, encoder.sae)
                self._telemetry.add("dist_sae_index_entries_total", len(encoded.acts))
                is_pending = True
            if queue:
                queue.wait_for_all()
        if mesh.any_rank(self._stopping.is_set()):
            raise Stopped(f"{self._worker.name}: stopped; start it again to continue")

    def _next_unit(
        self, queue: WorkQueue | None, claimed: int | None = None, *, wait: bool
    ) -> int | None:
        """Return the next unit, which the first rank claims for all; see `WorkQueue.take`.

        Args:
            queue: The queue; None on all ranks but the first.
            claimed: A unit that is already claimed. It comes next, unless `stopping` is set.
            wait: Whether to wait while other workers have claimed all remaining units.
        """
        unit = None
        if queue and claimed is None:
            unit = queue.take(wait=wait)
        elif not self._stopping.is_set():
            unit = claimed
        return self._mesh.all_gather_objects(unit, int | None)[0]

    def _encode(
        self, encoder: Encoder, unit: int, claim_next: Callable[[], int | None]
    ) -> Encoded | None:
        """Encode a unit. Return None if retention has deleted it."""
        self._report(working=True)
        try:
            if unit < retired_below(self._context.activations):
                return None
            return encoder.encode(unit, partial(self._report, working=True), claim_next)
        except CorruptObjectError:
            if self._mesh.world == 1 and unit < retired_below(self._context.activations):
                return None
            raise
        finally:
            self._report(working=False)

    def _skip_unit(self, unit: int, queue: WorkQueue | None) -> None:
        """Record a unit that retention has deleted."""
        if queue:
            store, folder, *_ = self._context
            record = UnitRecord(unit=unit, rows=0, deleted=True)
            store.put(folder.units.key(unit), seal(record), if_absent=True)
            logger.warning("unit %d was deleted (store.retention); it is left out", unit)
            self._release(queue, record)

    def _release(self, queue: WorkQueue | None, record: UnitRecord) -> None:
        """Release the claim on a unit whose record is stored, and report the progress."""
        assert queue is not None
        queue.release(record.unit, done=True)
        self._telemetry.life.progressed()
        self._telemetry.add("dist_sae_index_rows_total", record.rows)
        self._telemetry.set("dist_sae_index_units", queue.done())
        pace, n_units = self._pace.of(record.rows), len(self._context.manifest.units)
        self._telemetry.set("dist_sae_index_rows_per_second", pace)
        logs.progress("index", queue.done(), n_units, rows_per_second=pace)

    def _merge_buckets(self, buckets: list[int]) -> bool:
        """Run stage 2: merge buckets until all are merged.

        Returns:
            False if damaged units must be encoded again first.
        """
        context, mesh, own = self._context, self._mesh, self._worker
        store, folder, manifest, *_ = context
        worker = Worker(
            own.name if mesh.world == 1 else f"{own.name}/{mesh.rank}",
            own.number * mesh.world + mesh.rank,
            own.of * mesh.world,
        )
        work = Work(
            "bucket", buckets, folder.bucket_claims, folder.buckets, metrics=_BUCKET_METRICS
        )
        alive = partial(self._report, working=True)
        with self._queue(work, worker) as queue:
            assert queue is not None
            records: UnitRecords | None = None
            sample: Sample | None = None
            while (bucket := queue.take()) is not None:
                self._telemetry.life.begin()
                self._report(working=True)
                try:
                    if records is None:
                        self._pace = _Pace()
                        gc.collect()  # frees the encoder: the decoder below is as large
                        records = UnitRecords(unit_records(store, folder, manifest))
                        origins = Origins(store, records)
                        decoder = open_decoder(context, alive)
                        place = (store, folder.prefix, context.checkpoint, mesh.device)
                        cells = load_or_compute_cells(*place, alive) if context.neighbours else None
                        outputs = open_outputs(context.model, manifest, context.normalisers)
                        sample = Sample(store, manifest, records) if manifest.pair_share else None
                    latents = manifest.bucket(bucket)
                    weights = weight_columns(
                        context, latents, decoder, cells, outputs, mesh.device, alive
                    )
                    made = build_bucket(
                        *(store, folder, manifest, records, bucket, weights, origins, sample),
                        alive,
                    )
                except ObjectNotFoundError:
                    return False  # another worker has found a unit's codes damaged
                except CorruptObjectError as exc:
                    if store.size(folder.buckets.key(bucket)) is not None:
                        # another worker took over this bucket, finished and deleted the codes
                        queue.release(bucket, done=True)
                        continue
                    if not self._drop_damaged(records or (), exc):
                        raise
                    return False
                finally:
                    self._report(working=False)
                store.put(folder.buckets.key(bucket), seal(made), if_absent=True)
                queue.release(bucket, done=True)
                self._telemetry.life.progressed()
                self._telemetry.add("dist_sae_index_merged_entries_total", made.entries)
                self._telemetry.set("dist_sae_index_buckets", queue.done())
                pace = self._pace.of(made.entries)
                logs.progress("merge", queue.done(), len(buckets), entries_per_second=pace)
            queue.wait_for_all()
        if self._stopping.is_set() and queue.pending():
            raise Stopped(f"{worker.name}: stopped; start it again to continue")
        return True

    def _drop_damaged(self, records: Iterable[UnitRecord], exc: CorruptObjectError) -> bool:
        """Delete the records of units whose record, codes or table of rows is damaged.

        Args:
            records: Records of the index's units.
            exc: The error, which names the damaged object.

        Returns:
            False if the damaged object does not belong to a unit.

        Raises:
            CorruptObjectError: A unit cannot be encoded again, because retention has deleted it.
        """
        store, folder, manifest, *_ = self._context
        there = set(store.keys(folder.codes))
        damaged = {unit for unit in manifest.units if folder.units.key(unit) == exc.key}
        for record in records:
            chunks = [*(c for parts in record.buckets for c in parts), *record.sample]
            keys = {chunk.key for chunk in chunks}
            origin = record.origin and record.origin.key
            if exc.key in (origin, *keys) or not keys <= there:
                damaged.add(record.unit)
        if next(folder.buckets.numbers(store), None) is not None:
            retired = retired_below(self._context.activations)
            check_not_retired(store, folder, damaged, retired, [str(exc)])
        for record in records:
            if record.origin and record.origin.key == exc.key:
                store.delete(record.origin.key)
        if damaged:  # every unit of a complete index, because its codes are deleted
            logger.warning("encoding %d units again: %s", len(damaged), exc)
        for unit in sorted(damaged):
            store.delete(folder.units.key(unit))
        return bool(damaged)

    @contextmanager
    def _queue(
        self, work: Work, worker: Worker, *, lead: bool = False
    ) -> Iterator[WorkQueue | None]:
        """Open a queue and keep its claims renewed.

        Args:
            work: The work to share.
            worker: Who claims it.
            lead: Whether only the first rank claims work. The other ranks get None.
        """
        if lead and not self._mesh.is_first:
            yield None
            return
        queue = WorkQueue(self._context.store, work, worker, self._stopping, self._telemetry)
        with queue.renewed(lambda: self._telemetry.liveness.probe_failure("/livez") is None):
            try:
                yield queue
            finally:
                queue.release_all()

    def _report(self, *, working: bool) -> None:
        """Report to the watch and to the liveness check whether this rank is working."""
        self._done += working
        if self._watch:
            self._watch.set_step(self._done, working=working)
        if working:
            self._telemetry.liveness.busy(self._context.run.timeouts.hung_seconds)
        else:
            self._telemetry.liveness.idle()
