"""Creation of a plan, which assigns the documents of a corpus to units."""

import numpy as np
from numpy.typing import NDArray

from dist_sae.config import Run
from dist_sae.data.corpus import CorpusIndex
from dist_sae.data.deal import choose_layout, deal, hold_out
from dist_sae.data.identity import plan_settings
from dist_sae.data.orders import permutation
from dist_sae.data.plan import Plan
from dist_sae.data.planned_text import stores_texts
from dist_sae.errors import CorpusError

LAYOUT_SETTINGS = ("streams", "window_units", "unit_rows")


def make_plan(
    run: Run,
    index: CorpusIndex,
    rows: NDArray[np.int64],
    model: dict[str, str] | None = None,
) -> Plan:
    """Assign the documents of a corpus to units by size, in a seeded random order.

    Args:
        rows: Estimated rows of each span.
        model: `identity.model_content` of the model, if known.

    Raises:
        CorpusError: The corpus has too few documents for its streams, or too few rows for a batch.
    """
    activations, spans = run.activations, index.spans
    order = permutation(len(spans), activations.seed)
    if run.corpus.kind != "synthetic" and run.corpus.max_documents is not None:
        order = order[: -(-run.corpus.max_documents // spans[0].count)]
    train, heldout = hold_out(rows, order, activations.heldout_share)
    layout = choose_layout(
        rows[train],
        streams=activations.streams,
        window_units=activations.window_units,
        unit_rows=activations.unit_rows,
        trainers=run.processes.trainers,
        batch_rows=run.train.batch_rows,
    )
    streams, train_rows = layout.streams, int(rows[train].sum())
    giving = int(np.count_nonzero(rows[train]))
    if giving < streams:
        raise CorpusError(
            f"corpus: {giving} documents to train on are too few for {streams} streams; "
            f"add more text{' or lower activations.streams' if streams > 1 else ''}"
        )
    if train_rows < run.train.batch_rows:
        raise CorpusError(
            f"corpus: about {train_rows} rows to train on, less than one batch "
            f"(train.batch_rows {run.train.batch_rows}); add more text or lower train.batch_rows"
        )
    # every unit must get a document with rows, so few or long documents give fewer, larger units
    targets = layout.targets(train_rows // streams)[: giving // streams]
    dealt = deal(rows, train, targets, streams)
    if len(heldout):
        wanted = max(1, round(int(rows[heldout].sum()) / layout.unit_rows))
        dealt += deal(rows, heldout, np.ones(min(wanted, len(heldout)), dtype=np.int64), 1)
    settings = plan_settings(run)
    settings["activations"] |= {name: getattr(layout, name) for name in LAYOUT_SETTINGS}
    documents = sum(spans[i].count for i in order)
    return Plan(
        settings=settings,
        files=index.files,
        document_rows=int(rows[order].sum()) / documents,
        n_train_units=len(targets) * streams,
        units=tuple(tuple(spans[i] for i in unit) for unit in dealt),
        unit_rows=tuple(int(rows[unit].sum()) for unit in dealt),
        text_checksums=index.checksums(dealt),
        texts_stored=stores_texts(run),
        model_content=model,
        corpus_commit=index.commit,
    )
