"""`dist-sae produce`: text -> tokens -> activations -> shards, unit by unit.

Any number of producers work on one plan. Three stages overlap: one thread claims and tokenizes the
next unit, the calling thread runs the model on the current unit, and another thread checks, packs
and stores the previous unit. So the model waits for storage only if storing a unit takes longer
than computing it. Memory holds the rows of two units, and a second copy of the one being stored.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from dist_sae.config import Run
from dist_sae.config.data import SyntheticCorpus
from dist_sae.data.consumers import Consumers
from dist_sae.data.plan import Plan, check_model, load_plan, pin_to_plan
from dist_sae.data.planned_text import PlannedText
from dist_sae.data.shard import DTYPES, UnitManifest, existing_units
from dist_sae.data.work_queue import Worker
from dist_sae.errors import Stopped
from dist_sae.models import ActivationSource, build_source, build_tokenizer
from dist_sae.models.forward import Forward
from dist_sae.producing.progress import Progress
from dist_sae.producing.stages import ComputedUnit, TokenizedUnit, compute, finish, tokenize
from dist_sae.producing.unit_queue import unit_queue
from dist_sae.storage import ObjectStore, open_store
from dist_sae.storage.failure import ATTEMPT
from dist_sae.telemetry.exporter import Telemetry

logger = logging.getLogger(__name__)


def produce(
    run: Run,
    worker: Worker,
    stopping: threading.Event,
    telemetry: Telemetry,
    open_source: Callable[[], ActivationSource] | None = None,
) -> dict[str, int]:
    """Produce units until every unit of the plan exists.

    Args:
        stopping: Event that makes the producer abandon its current unit and end.
        open_source: Function that loads the model, called once there is work to do. None loads the
            run's model.

    Returns:
        The numbers of `units` and `rows` that this producer wrote.

    Raises:
        PlanMismatchError: The store has no plan, or a plan that does not fit the run.
        NonFiniteError: The model returned NaN or infinity.
        Stopped: `stopping` was set before the work was done.
    """
    producer = _Producer(run, worker, stopping, telemetry, open_source)
    with producer.at_work():
        upcoming = producer.tokenize_next()
        finishing: Future[UnitManifest] | None = None
        while (tokenized := _first_of(upcoming, finishing)) is not None:
            upcoming = producer.tokenize_next()
            computed = producer.compute(tokenized)
            if finishing is not None:
                producer.progress.finished(finishing.result())
            finishing = producer.finish(computed)
        if finishing is not None:
            producer.progress.finished(finishing.result())
    return dict(producer.progress.written)


def _first_of(
    upcoming: Future[TokenizedUnit | None], finishing: Future[UnitManifest] | None
) -> TokenizedUnit | None:
    """Wait for the next unit; if storing the previous one fails meanwhile, raise that error."""
    if finishing is not None:
        either: list[Future[Any]] = [upcoming, finishing]
        wait(either, return_when=FIRST_COMPLETED)
        if finishing.done():
            finishing.result()
    return upcoming.result()


class _Producer:
    """One producer: its queue, its threads and its model."""

    def __init__(
        self,
        run: Run,
        worker: Worker,
        stopping: threading.Event,
        telemetry: Telemetry,
        open_source: Callable[[], ActivationSource] | None,
    ) -> None:
        store = open_store(run.store.activations, run.store.s3, telemetry, stopping)
        plan = load_plan(store, run)
        self._run = run = pin_to_plan(run, plan)
        self._store, self._plan, self._worker = store, plan, worker
        self._stopping, self._telemetry = stopping, telemetry
        _warn_of_no_checksums(run, store, plan)
        consumers = Consumers(store, run.store.consumer_expiry_hours)
        ahead = run.store.max_ahead_units
        idle = run.store.consumer_expiry_hours if ATTEMPT in os.environ else None
        self._queue = unit_queue(
            store, plan, worker, stopping, consumers, ahead, telemetry, idle_hours=idle
        )
        telemetry.set("dist_sae_produce_plan_units", len(plan.units))
        telemetry.set("dist_sae_produce_producers", run.processes.producers)
        if ahead is not None:
            telemetry.set("dist_sae_produce_max_ahead_units", ahead)
        if len(list(existing_units(store))) < len(plan.units):
            check_model(run, plan)  # before any unit is claimed, because it reads all weights
        self.progress = Progress(plan, self._queue, telemetry)
        self.progress.report(doing="loading the model")
        self._tokenizer = build_tokenizer(run)
        self._text = PlannedText(run, plan, store)
        self._open_source = open_source or (lambda: build_source(run.model, run.activations.sites))
        self._forward: Forward | None = None
        self._tokenizing = ThreadPoolExecutor(1, "prepare")
        self._finishing = ThreadPoolExecutor(1, "finish")

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Renew claims within the block; at its end, stop the threads and release unfinished units.

        Raises:
            Stopped: The producer was stopped and units are still missing.
        """
        with self._queue.renewed(lambda: self._telemetry.liveness.probe_failure("/livez") is None):
            try:
                yield
            except BaseException:
                self._stopping.set()  # wakes the claiming thread, which may wait for producers
                raise
            finally:  # stop the threads first: none may claim or finish a unit after the release
                self._tokenizing.shutdown(cancel_futures=True)
                self._finishing.shutdown()
                self._queue.release_all()
        if self._stopping.is_set() and self._queue.pending():
            raise Stopped(f"{self._worker.name}: stopped; start it again to continue")
        self.progress.report()

    def tokenize_next(self) -> "Future[TokenizedUnit | None]":
        """Claim the next unit and turn its documents into batches, in a thread."""
        return self._tokenizing.submit(self._tokenize_next)

    def compute(self, unit: TokenizedUnit) -> ComputedUnit:
        """Run the model over a unit."""
        self._telemetry.life.begin()  # not earlier: others may have claimed all units for days
        if self._forward is None:
            stored = self._run.activations.dtype
            held = None if stored == "int8" else DTYPES[stored]
            self._forward = Forward(self._open_source(), held)
        special = self._tokenizer.special
        return compute(
            unit, self._forward, special, self._run, self._stopping, self._telemetry, self.progress
        )

    def finish(self, unit: ComputedUnit) -> "Future[UnitManifest]":
        """Store a unit, in a thread."""
        name, activations = self._worker.name, self._run.activations
        return self._finishing.submit(
            finish, unit, self._store, self._plan, activations, name, self._queue
        )

    def _tokenize_next(self) -> TokenizedUnit | None:
        unit = self._queue.take()
        if unit is None:
            return None
        return tokenize(self._run, self._text, self._tokenizer, unit)


def _warn_of_no_checksums(run: Run, store: ObjectStore, plan: Plan) -> None:
    if plan.text_checksums is None and not isinstance(run.corpus, SyntheticCorpus):
        logger.warning(
            "%s: its plan is from an earlier version and has no checksums of documents, so a "
            "change of the text is %s",
            store.url,
            "detected only by its size and time" if run.corpus.kind == "files" else "not detected",
        )
