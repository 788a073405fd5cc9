"""`dist-sae produce`: text -> tokens -> activations -> shards, unit by unit.

Any number of producers work on one plan. Three stages overlap: a thread claims and tokenises the
next unit, this thread runs the model on the present one, another thread checks, packs and stores
the last one. The model never waits for the network unless storing a unit takes longer than
computing it. In memory are the rows of two units, and once more of the one that is being stored.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_sae import logs
from dist_sae.config import Run
from dist_sae.config.data import ActivationsConfig, SyntheticCorpus
from dist_sae.data.consumers import Consumers
from dist_sae.data.corpus import Corpus, Document
from dist_sae.data.orders import spread
from dist_sae.data.plan import Plan, as_planned, check_model, load_plan, read_unit
from dist_sae.data.row_filters import admitted, of_usual_norm
from dist_sae.data.shard import (
    DTYPES,
    Rows,
    SiteShard,
    UnitManifest,
    existing_units,
    manifest_key,
    write_shard,
)
from dist_sae.data.tokens import TokenBatch, cut, pack
from dist_sae.data.work_queue import Worker, WorkQueue
from dist_sae.distributed.leader import Leader, Work, follow, leading
from dist_sae.distributed.mesh import join_mesh
from dist_sae.distributed.rendezvous import rendezvous
from dist_sae.distributed.watch import Watch
from dist_sae.errors import CorpusError, NonFiniteError, Stopped
from dist_sae.models import ActivationSource, Tokenizer, build_source, build_tokenizer
from dist_sae.models.forward import Forward, RowTransfer, in_step
from dist_sae.producing.unit_queue import unit_queue
from dist_sae.storage import ObjectStore, open_store
from dist_sae.storage.records import seal
from dist_sae.telemetry.exporter import Telemetry

logger = logging.getLogger(__name__)

_SITES_AT_ONCE = 4  # while they are stored; each needs its rows in order, and them again as bytes


class TokenizedUnit(NamedTuple):
    """A unit that waits for the model."""

    unit: int
    documents: int
    refused: int
    batches: list[TokenBatch]
    seconds: Counter[str]


class ComputedUnit(NamedTuple):
    """A unit that waits to be packed."""

    unit: int
    documents: int
    refused: int
    transfers: list[RowTransfer]
    """Its rows at every site, batch by batch."""
    origin: tuple[Tensor, ...]
    """Their tokens, positions and documents."""
    excluded: Counter[str]
    seconds: Counter[str]


def produce(
    run: Run,
    worker: Worker,
    stopping: threading.Event,
    telemetry: Telemetry,
    open_source: Callable[[], ActivationSource] | None = None,
) -> dict[str, int]:
    """Produce units until every unit of the plan exists.

    Args:
        run: The run.
        worker: This producer, among the others.
        stopping: When set, leave the unit at hand and return.
        telemetry: Takes the metrics.
        open_source: Loads the model, when there is something to do; that of the run if left out.

    Returns:
        `units` and `rows` that this producer wrote.

    Raises:
        PlanMismatchError: The store holds no plan, or another one.
        NonFiniteError: The model gave NaN or infinity.
        Stopped: `stopping` was set before the work was done.
    """
    store = open_store(run.store.activations, run.store.s3, telemetry, stopping)
    plan = load_plan(store, run)
    run = as_planned(run, plan)
    if plan.text_checksums is None and not isinstance(run.corpus, SyntheticCorpus):
        logger.warning(
            "%s: its plan is of an earlier version and has no checksums of documents: a change of "
            "the text is noticed %s",
            store.url,
            "by a file's size and time only" if run.corpus.kind == "files" else "by nothing",
        )
    consumers = Consumers(store, run.store.consumer_expiry_hours)
    ahead = run.store.max_ahead_units
    claims = unit_queue(store, plan, worker, stopping, consumers, ahead, telemetry)
    telemetry.set("dist_sae_produce_plan_units", len(plan.units))
    if ahead is not None:
        telemetry.set("dist_sae_produce_max_ahead_units", ahead)
    if len(list(existing_units(store))) < len(plan.units):
        check_model(run, plan)  # before any unit is claimed: it reads all weights
    progress = _Progress(plan, claims)
    progress.say(doing="loads the model")
    prepare = _Preparer(run, plan, claims)
    written = Counter(units=0, rows=0)
    open_source = open_source or (lambda: build_source(run.model, run.activations.sites))
    held = None if run.activations.dtype == "int8" else DTYPES[run.activations.dtype]
    forward: Forward | None = None
    with (
        claims.renewed(lambda: telemetry.pulse.fault("/livez") is None),
        ThreadPoolExecutor(1, "prepare") as preparer,
        ThreadPoolExecutor(1, "finish") as finisher,
    ):
        try:
            upcoming = preparer.submit(prepare.next_unit)
            finishing: Future[UnitManifest] | None = None
            while (tokenized := _first_of(upcoming, finishing)) is not None:
                upcoming = preparer.submit(prepare.next_unit)
                if forward is None:
                    forward = Forward(open_source(), held)
                computed = _compute(
                    tokenized, forward, prepare.tokenizer, run, stopping, telemetry, progress
                )
                if finishing is not None:
                    _report(finishing.result(), claims, telemetry, written, progress)
                finishing = finisher.submit(
                    _finish, computed, store, plan, run.activations, worker.name, claims
                )
            if finishing is not None:
                _report(finishing.result(), claims, telemetry, written, progress)
        except BaseException:
            stopping.set()  # wakes the preparing thread, which may wait for other producers
            raise
        finally:  # no thread may claim or finish anything after the release
            preparer.shutdown(cancel_futures=True)
            finisher.shutdown()
            claims.release_all()
    if stopping.is_set() and claims.pending():
        raise Stopped(f"{worker.name}: stopped; start it again to go on")
    progress.say()
    return dict(written)


def produce_together(
    run: Run, worker: Worker, stopping: threading.Event, telemetry: Telemetry
) -> dict[str, int]:
    """Produce as one of the `model.tensor_parallel` ranks that share a model; the first leads.

    Raises:
        RankLostError: Another rank is gone, hung or has failed.
        PlanMismatchError: The store holds no plan, or another one.
    """
    run = as_planned(run, load_plan(open_store(run.store.activations, run.store.s3), run))
    timeouts = run.timeouts
    with (
        rendezvous(
            run.tensor_parallel,
            timeouts.missing_seconds,
            stopping,
            setting="model.tensor_parallel",
            name=run.name,
        ) as ranks,
        Watch(
            ranks, stopping, lost_seconds=timeouts.lost_seconds, hung_seconds=timeouts.hung_seconds
        ) as watch,
        join_mesh(ranks) as mesh,
    ):
        telemetry.device = mesh.device

        def open_work() -> Work:
            return in_step(build_source(run.model, run.activations.sites).run)

        if not mesh.is_first:
            telemetry.pulse.rest()  # ready; whether it hangs is the watch's to say
            follow(open_work, mesh, watch)
            return {}
        with leading(mesh):
            return produce(run, worker, stopping, telemetry, lambda: Leader(open_work, mesh, watch))


def _first_of(
    upcoming: Future[TokenizedUnit | None], finishing: Future[UnitManifest] | None
) -> TokenizedUnit | None:
    """The next unit, which may be long in coming; if the last one cannot be finished, its error."""
    if finishing is not None:
        either: list[Future[Any]] = [upcoming, finishing]
        wait(either, return_when=FIRST_COMPLETED)
        if finishing.done():
            finishing.result()
    return upcoming.result()


class _Preparer:
    """WorkQueue the next unit and turns its documents into batches of tokens."""

    def __init__(self, run: Run, plan: Plan, claims: WorkQueue) -> None:
        self.tokenizer = build_tokenizer(run)
        self._run = run
        self._plan = plan
        self._claims = claims
        self._corpus = Corpus(run.corpus, run.store.s3)

    def next_unit(self) -> TokenizedUnit | None:
        unit = self._claims.take()
        if unit is None:
            return None
        return tokenize(self._run, self._plan, self._corpus, self.tokenizer, unit)


def tokenize(
    run: Run, plan: Plan, corpus: Corpus, tokenizer: Tokenizer, unit: int
) -> TokenizedUnit:
    """Read the documents of a unit, cut them into contexts and these into batches."""
    seconds, refused = Counter[str](), list[int]()
    activations, model = run.activations, run.model

    def failed(document: Document, exc: Exception) -> None:
        refused.append(document.number)
        logger.warning(
            "unit %d: document %d is left out, the tokenizer refuses it: %s",
            unit,
            document.number,
            str(exc).strip().partition("\n")[0],
        )

    bos = tokenizer.bos if activations.prepend_bos else None
    with _timed(seconds, "tokenize"):
        documents = read_unit(corpus, plan, unit)
        contexts = cut(
            documents, tokenizer, context_tokens=activations.context_tokens, bos=bos, failed=failed
        )
        batch_tokens = model.batch_tokens if model.kind == "huggingface" else 65_536
        batches = list(pack(contexts, batch_tokens=batch_tokens, bos=bos))
    return TokenizedUnit(unit, len(documents), len(refused), batches, seconds)


def _compute(
    work: TokenizedUnit,
    forward: Forward,
    tokenizer: Tokenizer,
    run: Run,
    stopping: threading.Event,
    telemetry: Telemetry,
    progress: "_Progress",
) -> ComputedUnit:
    """Run the model over a unit and keep the rows that the rules for tokens admit."""
    if not work.batches:
        raise CorpusError(
            f"unit {work.unit}: none of its {work.documents} documents has a token; "
            f"take empty documents out of the corpus or raise activations.unit_rows"
        )
    excluded: Counter[str] = Counter()
    transfers: list[RowTransfer] = []
    origins: list[tuple[Tensor, ...]] = []
    n_rows = 0
    with _timed(work.seconds, "forward"):
        for batch in work.batches:
            if stopping.is_set():
                raise Stopped(f"stopped within unit {work.unit}; start again to go on")
            telemetry.pulse.work(run.timeouts.hung_seconds)
            keep = admitted(batch, tokenizer.special, run.activations.exclude, excluded)
            transfers += forward(batch.tokens, batch.mask, keep)
            telemetry.add("dist_sae_produce_tokens_total", int(batch.mask.sum()))
            origins.append((batch.tokens[keep], batch.positions[keep], batch.documents[keep]))
            n_rows += int(keep.sum())
            progress.within(work, n_rows)
    telemetry.pulse.rest()
    origin = tuple(map(torch.cat, zip(*origins, strict=True)))
    return ComputedUnit(
        work.unit, work.documents, work.refused, transfers, origin, excluded, work.seconds
    )


def _finish(
    computed: ComputedUnit,
    store: ObjectStore,
    plan: Plan,
    activations: ActivationsConfig,
    worker: str,
    claims: WorkQueue,
) -> UnitManifest:
    """Check, exclude by norm, shuffle, store the shards, and the manifest last."""
    unit, seconds = computed.unit, computed.seconds
    with ThreadPoolExecutor(_SITES_AT_ONCE, "site") as pool:
        with _timed(seconds, "pack"):
            arrived = [transfer.wait() for transfer in computed.transfers]
            computed.transfers.clear()
            sites = {
                site: Rows(torch.cat([batch.pop(site) for batch in arrived]), *computed.origin)
                for site in activations.sites
            }
            keep = torch.ones(len(computed.origin[0]), dtype=torch.bool)
            for usual in pool.map(partial(_usual, activations), sites, sites.values()):
                keep &= usual
            computed.excluded["over_norm"] = int((~keep).sum())
            kept = keep.nonzero()[:, 0]
            documents = computed.origin[2][kept].numpy()
            order = kept[torch.from_numpy(spread(documents, plan.seed, 4, unit))]

        def write(site: str) -> SiteShard:
            rows = sites.pop(site).take(order)
            return write_shard(store, unit, site, rows, activations.block_rows, activations.dtype)

        with _timed(seconds, "store"):
            shards = dict(zip(activations.sites, pool.map(write, activations.sites), strict=True))
    manifest = UnitManifest(
        plan=plan.hash,
        unit=unit,
        producer=worker,
        documents=computed.documents,
        refused=computed.refused,
        rows=len(order),
        excluded=dict(computed.excluded),
        seconds={stage: round(s, 3) for stage, s in seconds.items()},
        sites=shards,
    )
    # if another producer was faster its unit stands, and this one's shards are orphans
    store.put(manifest_key(unit), seal(manifest), if_absent=True)
    claims.release(unit, done=True)
    return manifest


def _usual(activations: ActivationsConfig, site: str, rows: Rows) -> Tensor:
    """Which rows of a site are not excluded by their norm.

    Raises:
        NonFiniteError: The model gave NaN or infinity.
    """
    finite = rows.acts.isfinite().all(dim=1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise NonFiniteError(
            f"{site}: NaN or infinity in document {rows.documents[row]} "
            f"at position {rows.positions[row]}; "
            f"check the model, or use a wider model.dtype or activations.dtype"
        )
    return of_usual_norm(rows.acts, activations.exclude.over_norm)


def _report(
    manifest: UnitManifest,
    claims: WorkQueue,
    telemetry: Telemetry,
    written: Counter[str],
    progress: "_Progress",
) -> None:
    written.update(units=1, rows=manifest.rows)
    telemetry.add("dist_sae_produce_units_total", 1)
    telemetry.add("dist_sae_produce_rows_total", manifest.rows)
    telemetry.add("dist_sae_produce_refused_documents_total", manifest.refused)
    for reason, count in manifest.excluded.items():
        telemetry.add("dist_sae_produce_excluded_rows_total", count, reason=reason)
    for stage, seconds in manifest.seconds.items():
        telemetry.add("dist_sae_produce_seconds_total", seconds, stage=stage)
    telemetry.set("dist_sae_produce_ready_units", claims.done())
    busy = max(manifest.seconds, key=lambda stage: manifest.seconds[stage])
    progress.say(
        rows=manifest.rows,
        rows_per_second=round(manifest.rows / max(manifest.seconds[busy], 1e-9)),
        busiest=busy,
    )


class _Progress:
    """How far production is, in rows: those of units that exist, and of the unit at hand so far."""

    def __init__(self, plan: Plan, claims: WorkQueue) -> None:
        self._rows = plan.rows_of_units
        self._claims = claims
        self._at_hand: dict[int, int] = {}
        self._pace = logs.PacedProgress("produce")
        self._began = 0.0

    def within(self, work: TokenizedUnit, n_rows: int) -> None:
        """Say how many rows of a unit the model has given, when it is worth saying."""
        if work.unit not in self._at_hand:
            self._began = time.monotonic()
        self._at_hand[work.unit] = min(n_rows, self._rows[work.unit])
        if self._pace.is_due():
            seconds = time.monotonic() - self._began
            slower = work.seconds["tokenize"] > seconds
            self.say(
                **({"rows_per_second": round(n_rows / seconds)} if seconds > 1 else {}),
                busiest="tokenize" if slower else "forward",
                doing="",
            )

    def say(self, **numbers: Any) -> None:
        """Say it now."""
        left = self._claims.left()
        self._at_hand = {unit: rows for unit, rows in self._at_hand.items() if unit in left}
        total = sum(self._rows)
        logs.progress(
            "produce",
            total - sum(self._rows[unit] for unit in left),
            total,
            at_hand=sum(self._at_hand.values()),
            units=self._claims.done(),
            **numbers,
        )


@contextmanager
def _timed(seconds: Counter[str], stage: str) -> Iterator[None]:
    since = time.monotonic()
    yield
    seconds[stage] += time.monotonic() - since  # type: ignore[assignment] # Counter holds floats well
