"""`dist-sae plan`: read the corpus once and fix which documents make up which unit."""

import logging

from dist_sae.config import Run
from dist_sae.config.data import SyntheticCorpus
from dist_sae.data.corpus import Corpus, CorpusIndex
from dist_sae.data.identity import model_content
from dist_sae.data.orders import permutation
from dist_sae.data.plan import (
    PLAN_KEY,
    Plan,
    as_planned,
    check_rows,
    load_plan,
    make_plan,
    publish_plan,
)
from dist_sae.data.tokens import cut
from dist_sae.errors import EXIT_USER, CorpusError, HubUnavailableError
from dist_sae.models import build_tokenizer, check_sites
from dist_sae.storage import UNMETERED, Meter, open_store

logger = logging.getLogger(__name__)

_MUCH_MORE = 1.5
_SAMPLE_SPANS = 512  # to estimate how many rows a document gives


def plan(run: Run, meter: Meter = UNMETERED) -> Plan:
    """Make the plan of a run's activation set, or find that it is there already.

    Args:
        run: The run.
        meter: Takes the metrics.

    Raises:
        CorpusError: The text is missing, unreadable, empty or too small.
        ModelError: The model cannot be found, or cannot be recorded at a site.
        DataExhaustedError: `train.rows` asks for more than there will be.
        PlanMismatchError: The store holds a plan made from other settings or other text.
    """
    store = open_store(run.store.activations, run.store.s3, meter)
    is_planned = store.size(PLAN_KEY) is not None
    if is_planned:  # what the hub had then, whatever it has now
        run = as_planned(run, load_plan(store, run))
    try:
        corpus = Corpus(run.corpus, run.store.s3)
        index = corpus.index()
        check_sites(run.model, run.activations)
        content = model_content(run.model)
        made = make_plan(run, index, _document_rows(run, corpus, index), content)
    except HubUnavailableError as exc:
        if not is_planned:
            exc.exit_code = EXIT_USER  # nothing has shown yet that the name is right
        raise
    check_rows(run, made)
    if made.train_rows_estimate > _MUCH_MORE * run.train.rows:
        logger.warning(
            "the activation set will have about %d rows to train on, of which this run takes %d: "
            "all are made; corpus.max_documents makes fewer",
            made.train_rows_estimate,
            run.train.rows,
        )
    there = publish_plan(store, made)
    created, made = there is made, there
    documents = sum(span.count for unit in made.units for span in unit)
    meter.set("dist_sae_plan_units", len(made.units))
    meter.set("dist_sae_plan_documents", documents)
    meter.set("dist_sae_plan_train_rows", made.train_rows_estimate)
    logger.info(
        "%s %s: %d documents, %d training and %d held-out units, about %d rows to train on",
        "made" if created else "found",
        store.url,
        documents,
        len(made.train_units),
        len(made.heldout_units),
        made.train_rows_estimate,
    )
    return made


def _document_rows(run: Run, corpus: Corpus, index: CorpusIndex) -> float:
    """Rows per document over a seeded sample, after the exclusions that depend on tokens alone."""
    if isinstance(run.corpus, SyntheticCorpus):
        return float(run.corpus.document_rows)
    tokenizer = build_tokenizer(run.model, 0)
    activations = run.activations
    sample = permutation(len(index.spans), activations.seed, 3)[:_SAMPLE_SPANS]
    documents = corpus.read(index.files, [index.spans[i] for i in sample])
    bos = tokenizer.bos if activations.prepend_bos else None
    contexts = cut(
        documents,
        tokenizer,
        context_tokens=activations.context_tokens,
        bos=bos,
        failed=lambda *_: None,  # gives no rows; producers tell of it
    )
    first = activations.exclude.first_positions
    rows = sum(max(0, len(c.tokens) - max(first, 0 if bos is None else 1)) for c in contexts)
    if rows == 0:
        raise CorpusError("corpus: a sample of its documents gives no tokens; give files with text")
    return rows / len(documents)
