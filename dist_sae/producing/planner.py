"""`dist-sae plan`: reads the corpus once and decides which documents form which unit."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_sae import logs
from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.config import Run, jobs_of
from dist_sae.config.data import SyntheticCorpus
from dist_sae.data.corpus import Corpus, CorpusIndex
from dist_sae.data.estimate import estimate_rows, rows_of_tokens
from dist_sae.data.identity import model_content
from dist_sae.data.make_plan import LAYOUT_SETTINGS, make_plan
from dist_sae.data.plan import PLAN_KEY, Plan, find_plan, load_plan, pin_to_plan, publish_plan
from dist_sae.data.planned_text import store_texts
from dist_sae.data.shard import DTYPES, ORIGIN_BYTES
from dist_sae.distributed.deepspeed_keys import check_deepspeed
from dist_sae.errors import EXIT_USER, HubUnavailableError
from dist_sae.models import build_tokenizer, check_sites
from dist_sae.storage import UNMETERED, Meter, open_store
from dist_sae.training.ineffective import ineffective_settings
from dist_sae.training.start import Start

logger = logging.getLogger(__name__)

_MUCH_MORE = 1.5
_MUCH_LOST = 0.05


def plan(run: Run, meter: Meter = UNMETERED) -> Plan:
    """Create or find the plan of a run's activation set; see `plan_and_forecast`."""
    return plan_and_forecast(run, meter)[0]


def plan_and_forecast(run: Run, meter: Meter = UNMETERED) -> tuple[Plan, dict[str, Any]]:
    """Create or find the plan of a run's activation set, and forecast its units, rows and bytes.

    Raises:
        ConfigError: DeepSpeed does not accept `train.deepspeed`, or the run cannot start.
        CorpusError: The text is missing, unreadable, empty or too small.
        ModelError: The model cannot be found, or one of the sites cannot be recorded.
        DataExhaustedError: `train.rows` exceeds the rows that the plan promises.
        PlanMismatchError: The store has a plan made from other settings, text or model.
    """
    for job in jobs_of(run):
        check_deepspeed(job)  # before anything is read or written
    store = open_store(run.store.activations, run.store.s3, meter)
    is_planned = store.size(PLAN_KEY) is not None
    known: CorpusIndex | None = None
    if is_planned:
        earlier = load_plan(store, run)
        run = pin_to_plan(run, earlier)  # with the plan's commits, even if the hub has newer ones
        known = _known_text(run, earlier)
    try:
        corpus = Corpus(run.corpus, run.store.s3)
        pace = logs.RateLimitedProgress("plan")
        pace(0, 1, doing="reading the text")
        index = known or corpus.index(
            lambda n: pace(0, 1, doing=f"reading the text: {n:,} documents")
        )
        widths = check_sites(run.model, run.activations)
        content = model_content(run.model)
        found = find_plan(store, run, index, content)
        made = found or make_plan(run, index, count_rows(run, corpus, index, pace), content)
    except HubUnavailableError as exc:
        if not is_planned:
            exc.exit_code = EXIT_USER  # without a plan, the name on the hub may be wrong
        raise
    started = [(_start(job, made, meter), job) for job in jobs_of(run)]
    jobs = [(start.resolve(job, made), start.taken_rows(made)) for start, job in started]
    for (start, _), (job, _) in zip(started, jobs, strict=True):
        start.check(job, made)
    if made.texts_stored:
        n_units = len(made.units)
        store_texts(store, corpus, made, lambda n: pace(n / n_units, 1, doing="storing the text"))
    there = found or publish_plan(store, made)
    created, made = there is made and not found, there
    longest, taken_rows = max(jobs, key=lambda job: job[0].steps)
    figures = forecast(longest, made, widths, taken_rows)
    meter.set("dist_sae_plan_units", len(made.units))
    meter.set("dist_sae_plan_documents", figures["documents"])
    meter.set("dist_sae_plan_train_rows", made.train_rows_estimate)
    logger.info("%s %s: %s", "created" if created else "found", store.url, describe(figures))
    void = dict.fromkeys(line for job, _ in jobs for line in ineffective_settings(job, made))
    for warning in (*_warnings(figures), *void):
        logger.warning("%s", warning)
    logs.progress("plan", 1, 1, said=describe(figures))
    return made, figures


def _known_text(run: Run, plan: Plan) -> CorpusIndex | None:
    """Return an earlier plan's index of the run's text, if the text need not be read again."""
    if not (
        plan.texts_stored
        and Corpus(run.corpus, run.store.s3).consists_of(plan.files, plan.corpus_commit)
    ):
        return None
    return CorpusIndex(plan.files, [], [], commit=plan.corpus_commit)


def _start(run: Run, plan: Plan, meter: Meter) -> Start:
    """Return the state that training would start from now."""
    runs = open_store(run.store.runs, run.store.s3, meter)
    newest = Checkpoints(runs, run.name, run.train.keep_checkpoints).latest()
    if newest and newest.scalars.get("plan") == plan.hash:
        return Start.from_own_checkpoints([newest])
    return Start.from_parent(runs, run, plan)


def forecast(
    run: Run, plan: Plan, widths: Mapping[str, int], taken_rows: int = 0
) -> dict[str, Any]:
    """Forecast the units, rows and bytes of a plan, before anything is produced.

    Args:
        run: Run, resolved by the plan.
        widths: Width of each site.
        taken_rows: Rows of the set that the run's parents took.

    Returns:
        `plan`, its hash; the counts `documents`, `train_units` and `heldout_units`; the layout
        `streams`, `window_units`, `unit_rows` and `first_unit_rows`; `first_windows_units`, which
        must exist before training begins; the estimates `train_rows` and `heldout_rows` of stored
        rows, `pass_rows` that a pass gives to training, `unusable_rows` that it does not, and
        `bytes` of all rows in the store; `taken_rows` of the run's parents, and the run's own
        `run_rows` and `passes`.
    """
    rows = plan.rows_of_units
    return {
        "plan": plan.hash,
        "documents": sum(span.count for unit in plan.units for span in unit),
        "train_units": len(plan.train_units),
        "heldout_units": len(plan.heldout_units),
        **{name: plan.settings["activations"][name] for name in LAYOUT_SETTINGS},
        "first_unit_rows": rows[0],
        "first_windows_units": plan.first_windows,
        "train_rows": plan.train_rows_estimate,
        "heldout_rows": sum(rows[plan.n_train_units :]),
        "pass_rows": plan.pass_rows,
        "unusable_rows": plan.train_rows_estimate - plan.pass_rows,
        "bytes": sum(rows) * row_bytes(run.activations.dtype, widths),
        "taken_rows": taken_rows,
        "run_rows": run.steps * run.train.batch_rows,
        "passes": round(run.steps * run.train.batch_rows / plan.pass_rows, 3),
    }


def row_bytes(dtype: str, widths: Mapping[str, int]) -> int:
    """Compute the bytes of one row, summed over all sites."""
    scale = 4 if dtype == "int8" else 0
    return sum(DTYPES[dtype].itemsize * d_in + scale + ORIGIN_BYTES for d_in in widths.values())


def describe(figures: dict[str, Any]) -> str:
    """Return a forecast as a sentence."""
    after = f", after its parents' {figures['taken_rows']:,} rows" if figures["taken_rows"] else ""
    return (
        f"{figures['documents']:,} documents in {figures['train_units']} units to train on and "
        f"{figures['heldout_units']} held out; about {figures['pass_rows']:,} rows per pass, "
        f"{figures['bytes'] / 1e9:,.2f} GB; the run takes {figures['run_rows']:,} rows, "
        f"{figures['passes']:.2g} passes{after}"
    )


def _warnings(figures: dict[str, Any]) -> Iterator[str]:
    if figures["pass_rows"] > _MUCH_MORE * (figures["taken_rows"] + figures["run_rows"]):
        yield (
            f"the activation set will have about {figures['pass_rows']:,} rows to train on, of "
            f"which this run takes {figures['run_rows']:,}: all are produced; set "
            f"corpus.max_documents to produce fewer"
        )
    if figures["unusable_rows"] > _MUCH_LOST * figures["train_rows"]:
        yield (
            f"about {figures['unusable_rows']:,} of {figures['train_rows']:,} rows cannot be used "
            f"in a pass: a document is longer than a stream's share; lower activations.streams "
            f"({figures['streams']}), or split the longest documents"
        )


def count_rows(
    run: Run, corpus: Corpus, index: CorpusIndex, pace: logs.RateLimitedProgress
) -> NDArray[np.int64]:
    """Estimate the rows of each span."""
    if isinstance(run.corpus, SyntheticCorpus):
        counts = np.array([span.count for span in index.spans])
        tokens = np.full(len(counts), run.corpus.document_rows)
        return counts * rows_of_tokens(tokens, run.activations, bos=None).astype(np.int64)
    tokenizer = build_tokenizer(run)
    return estimate_rows(
        corpus,
        index,
        run.activations,
        tokenizer,
        bos=tokenizer.bos if run.activations.prepend_bos else None,
        special=tokenizer.special,
        on_progress=lambda done, of: pace(done / of, 1, doing="counting tokens"),
    )
