"""Stages of producing a unit: text to tokens, tokens to rows of activations, rows to shards."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dist_sae.config import Run
from dist_sae.config.data import ActivationsConfig
from dist_sae.data.corpus import Document
from dist_sae.data.orders import spread
from dist_sae.data.plan import Plan
from dist_sae.data.planned_text import PlannedText
from dist_sae.data.row_filters import kept_by_norm, kept_by_token_rules
from dist_sae.data.shard import SiteRows, SiteShard, UnitManifest, manifest_key, write_shard
from dist_sae.data.tokens import TokenBatch, cut, pack
from dist_sae.data.work_queue import WorkQueue
from dist_sae.errors import CorpusError, NonFiniteError, Stopped
from dist_sae.models import Tokenizer
from dist_sae.models.forward import Forward, RowTransfer
from dist_sae.producing.progress import Progress
from dist_sae.storage import ObjectStore
from dist_sae.storage.records import seal
from dist_sae.telemetry.exporter import Telemetry

logger = logging.getLogger(__name__)

_SITES_AT_ONCE = 4  # limits memory: storing a site needs a shuffled copy of its rows, and its tar


class TokenizedUnit(NamedTuple):
    """A unit that is ready for the model."""

    unit: int
    documents: int
    refused: int
    batches: list[TokenBatch]
    seconds: Counter[str]


class ComputedUnit(NamedTuple):
    """A unit that is ready to be packed and stored."""

    source: TokenizedUnit
    transfers: list[RowTransfer]
    """Rows of the unit at every site, batch by batch."""
    origin: tuple[Tensor, ...]
    """Tokens, positions and documents of the rows."""
    excluded: Counter[str]


def tokenize(run: Run, text: PlannedText, tokenizer: Tokenizer, unit: int) -> TokenizedUnit:
    """Read the documents of a unit, cut them into contexts, and pack the contexts into batches."""
    seconds, refused = Counter[str](), list[int]()
    activations, model = run.activations, run.model

    def failed(document: Document, exc: Exception) -> None:
        refused.append(document.number)
        logger.warning(
            "unit %d: document %d is skipped because the tokenizer refuses it: %s",
            unit,
            document.number,
            str(exc).strip().partition("\n")[0],
        )

    bos = tokenizer.bos if activations.prepend_bos else None
    with _timed(seconds, "tokenize"):
        documents = text.read(unit)
        contexts = cut(
            documents, tokenizer, context_tokens=activations.context_tokens, bos=bos, failed=failed
        )
        batch_tokens = model.batch_tokens if model.kind == "huggingface" else 65_536
        batches = list(pack(contexts, batch_tokens=batch_tokens, bos=bos))
    return TokenizedUnit(unit, len(documents), len(refused), batches, seconds)


def compute(
    work: TokenizedUnit,
    forward: Forward,
    special: frozenset[int],
    run: Run,
    stopping: threading.Event,
    telemetry: Telemetry,
    progress: Progress,
) -> ComputedUnit:
    """Run the model over a unit, and drop the rows that are excluded by a rule about tokens."""
    if not work.batches:
        raise CorpusError(
            f"unit {work.unit}: its {work.documents} documents contain no tokens; "
            f"remove empty documents from the corpus or raise activations.unit_rows"
        )
    excluded: Counter[str] = Counter()
    transfers: list[RowTransfer] = []
    origins: list[tuple[Tensor, ...]] = []
    n_rows = 0
    with _timed(work.seconds, "forward"):
        for batch in work.batches:
            if stopping.is_set():
                raise Stopped(f"stopped within unit {work.unit}; start again to continue")
            telemetry.liveness.busy(run.timeouts.hung_seconds)
            keep = kept_by_token_rules(batch, special, run.activations.exclude, excluded)
            transfers += forward(batch.tokens, batch.mask, keep)
            telemetry.add("dist_sae_produce_tokens_total", int(batch.mask.sum()))
            origins.append((batch.tokens[keep], batch.positions[keep], batch.documents[keep]))
            n_rows += int(keep.sum())
            progress.computed(work.unit, n_rows, work.seconds["tokenize"])
    telemetry.liveness.idle()
    origin = tuple(map(torch.cat, zip(*origins, strict=True)))
    return ComputedUnit(work, transfers, origin, excluded)


def finish(
    computed: ComputedUnit,
    store: ObjectStore,
    plan: Plan,
    activations: ActivationsConfig,
    worker: str,
    queue: WorkQueue,
) -> UnitManifest:
    """Check and shuffle a unit's rows, exclude rows by norm, and store shards and manifest."""
    unit, documents, refused, _, seconds = computed.source
    with ThreadPoolExecutor(_SITES_AT_ONCE, "site") as pool:
        with _timed(seconds, "pack"):
            arrived = [transfer.wait() for transfer in computed.transfers]
            computed.transfers.clear()
            sites = {
                site: SiteRows(torch.cat([batch.pop(site) for batch in arrived]), *computed.origin)
                for site in activations.sites
            }
            keep = torch.ones(len(computed.origin[0]), dtype=torch.bool)
            for usual in pool.map(partial(_usual, activations), sites, sites.values()):
                keep &= usual
            computed.excluded["over_norm"] = int((~keep).sum())
            kept = keep.nonzero()[:, 0]
            groups = computed.origin[2][kept].numpy()
            order = kept[torch.from_numpy(spread(groups, plan.seed, 4, unit))]

        def write(site: str) -> SiteShard:
            rows = sites.pop(site).take(order)
            return write_shard(store, unit, site, rows, activations.block_rows, activations.dtype)

        with _timed(seconds, "store"):
            shards = dict(zip(activations.sites, pool.map(write, activations.sites), strict=True))
    manifest = UnitManifest(
        plan=plan.hash,
        unit=unit,
        producer=worker,
        documents=documents,
        refused=refused,
        rows=len(order),
        excluded=dict(computed.excluded),
        seconds={stage: round(s, 3) for stage, s in seconds.items()},
        sites=shards,
    )
    # if another producer was faster, its manifest stays and the shards stored here are orphans
    store.put(manifest_key(unit), seal(manifest), if_absent=True)
    queue.release(unit, done=True)
    return manifest


def _usual(activations: ActivationsConfig, site: str, rows: SiteRows) -> Tensor:
    """Mark the rows of a site that are not excluded by their norm.

    Raises:
        NonFiniteError: The model returned NaN or infinity.
    """
    finite = rows.acts.isfinite().all(dim=1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise NonFiniteError(
            f"{site}: NaN or infinity in document {rows.documents[row]} "
            f"at position {rows.positions[row]}; "
            f"check the model, or use a wider model.dtype or activations.dtype"
        )
    return kept_by_norm(rows.acts, activations.exclude.over_norm)


@contextmanager
def _timed(seconds: Counter[str], stage: str) -> Iterator[None]:
    since = time.monotonic()
    yield
    seconds[stage] += time.monotonic() - since  # type: ignore[assignment] # Counter holds floats well
