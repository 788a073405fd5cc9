"""`dist-sae report`: one HTML file with a run's metrics, curves and latents."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from dist_sae.checkpoint.layout import Checkpoint
from dist_sae.checkpoint.lineage import Lineage
from dist_sae.checkpoint.run_folder import started_run
from dist_sae.checkpoint.trained import (
    check_plan,
    check_same_settings,
    find_checkpoint,
    normalisers_of,
    suffix,
    trained_run,
)
from dist_sae.config import Run, dump_run
from dist_sae.config.data import HuggingFaceModel, ModelConfig
from dist_sae.config.dictionary import KSelectionConfig
from dist_sae.config.fingerprint import run_fingerprint
from dist_sae.data.plan import Plan, load_plan
from dist_sae.environment import hardware, versions
from dist_sae.errors import CorpusError, ModelError, NoIndexError, ObjectNotFoundError
from dist_sae.evaluation.cache import fingerprint
from dist_sae.evaluation.facts import (
    evaluation_key,
    read_evaluation,
    run_facts,
    training_seconds,
    unit_totals,
)
from dist_sae.explaining.stored import ExplanationSet, sets
from dist_sae.index.query import Index, index_of
from dist_sae.index.summary import left_out
from dist_sae.index.texts import Texts
from dist_sae.report.formatting import format_duration
from dist_sae.report.latents import LatentView, choose_latents, view_latents
from dist_sae.report.outcome import read_outcomes
from dist_sae.report.page import Page, render_page
from dist_sae.report.profile import read_profiles
from dist_sae.storage import UNMETERED, Meter, ObjectStore, open_store
from dist_sae.storage.records import digest
from dist_sae.telemetry.history import read_history
from dist_sae.training.ineffective import ineffective_settings

logger = logging.getLogger(__name__)

_RUN_FILE = "RUN.yaml"
_AGAIN = "then run dist-sae report again."
_HEAD_BYTES = 1000  # at the start of the page, which contain the digest of its inputs


def report(run: Run, meter: Meter = UNMETERED, step: int | None = None) -> str:
    """Write `<run>/report/report.html` from everything that the run has stored so far.

    The report of a step other than the newest is `<run>/report/report-step-<step>.html`. An
    existing report is not rewritten if its inputs are the same.

    Args:
        run: The run.
        meter: Receives the metrics.
        step: Step of the checkpoint; None takes the newest.

    Returns:
        The path or URL of the report.

    Raises:
        ConfigError: There is no checkpoint of that step.
        PlanMismatchError: The activation set has no plan, or its plan has other settings; or the
            run was trained with other settings.
    """
    runs = open_store(run.store.runs, run.store.s3, meter)
    activations = open_store(run.store.activations, run.store.s3, meter)
    plan = load_plan(activations, run)
    checkpoint = find_checkpoint(runs, run, step)
    if checkpoint is None and (begun := started_run(runs, run.name)):  # it may have curves already
        check_same_settings(run_fingerprint(begun), run)
    name_suffix = "" if checkpoint is None else suffix(runs, run, checkpoint.step)
    evaluation = read_evaluation(runs, evaluation_key(run.name, name_suffix))
    history = read_history(runs, run.name)
    made = unit_totals(activations, plan)
    index = _open_index(runs, run, checkpoint)
    outcomes = [
        outcome
        for outcome in (read_outcomes(runs, run.name) if checkpoint else ())
        if checkpoint and outcome.checkpoints.get(run.name) == checkpoint.digest
    ]
    made_from = fingerprint(
        [
            checkpoint and checkpoint.digest,
            index if isinstance(index, str) else digest(index.manifest),
            [] if isinstance(index, str) else list(map(_digest, sets(index))),
            [digest(outcome) for outcome in outcomes],
            *(evaluation, history, made, dump_run(run), versions()),
        ]
    )
    key = report_key(run, name_suffix)
    if _is_up_to_date(runs, key, made_from):
        logger.info("the report is up to date: %s/%s", runs.url, key)
        return f"{runs.url}/{key}"
    # after the checks above, which must not compare settings that the run file leaves open
    resolved = plan.resolve(run)
    own = resolved
    if checkpoint is not None:
        own = trained_run(checkpoint, run)
        check_plan(own, checkpoint, plan.hash)
    views, no_texts = _latents(resolved, index, plan)
    page = Page(
        title=run.name,
        facts=list(_facts(own, checkpoint, history, run_facts(own, plan, made, checkpoint))),
        run_file=_RUN_FILE,
        made_from=made_from,
        evaluation=evaluation,
        history=history,
        producer_seconds=made["seconds"],
        ineffective_settings=ineffective_settings(own, plan),
        latents=views,
        left_out=[] if isinstance(index, str) else left_out(index.manifest),
        latent_rows=0 if isinstance(index, str) else index.rows,
        no_latents=no_texts,
        profiles=None if isinstance(index, str) else read_profiles(index),
        outcomes=outcomes,
    )
    runs.put(key, render_page(page).encode())
    return f"{runs.url}/{key}"


def report_key(run: Run, name_suffix: str = "") -> str:
    """Return the key of the report in the store of runs."""
    return f"{run.name}/report/report{name_suffix}.html"


def _digest(explanations: ExplanationSet) -> str | None:
    record = explanations.record()
    return digest(record) if record else None


def _is_up_to_date(runs: ObjectStore, key: str, made_from: str) -> bool:
    """Return whether a report with the same inputs exists."""
    try:
        return made_from.encode() in runs.get(key, 0, _HEAD_BYTES)
    except ObjectNotFoundError:
        return False


def _open_index(runs: ObjectStore, run: Run, checkpoint: Checkpoint | None) -> Index | str:
    """Open the index of a checkpoint, or return the reason why it has none."""
    if checkpoint is None:
        return f"No checkpoint yet: run dist-sae train {_RUN_FILE}, {_AGAIN}"
    try:
        return index_of(runs, run.name, checkpoint)
    except NoIndexError as error:
        logger.info("the report has no latents: %s", error)
        return f"No latent index of this checkpoint: run dist-sae index {_RUN_FILE}, {_AGAIN}"


def _latents(run: Run, index: Index | str, plan: Plan) -> tuple[list[LatentView], str]:
    """View a sample of latents. Also return why there are none, or why they have no texts."""
    if isinstance(index, str):
        return [], index
    chosen = choose_latents(index.firings, run.evaluate.latents, run.train.seed)
    if not chosen:
        return [], f"No latent fires often enough in {index.rows:,} rows to be shown."
    try:
        return view_latents(index, chosen, Texts(run, plan)), ""
    except (CorpusError, ModelError) as error:  # the numbers can still be shown
        return view_latents(index, chosen, None), f"The text cannot be shown: {error}"


def _facts(
    own: Run,
    checkpoint: Checkpoint | None,
    history: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
) -> Iterator[tuple[str, str]]:
    yield "Model", _model(own.model)
    yield "Site", own.described_sites
    yield "Corpus", own.corpus.label
    yield "Documents", _documents(facts)
    yield "Rows left out", _excluded_rows(facts["excluded_rows"])
    yield "Dictionary", _recipe(own)
    yield "Dead after", f"{own.dead_after_rows:,} rows without firing"
    if isinstance(own.sae, KSelectionConfig):
        auxk, weight = own.sae.auxk, own.sae.auxk_coefficient
        yield "AuxK", f"{auxk:,} latents, weight {weight:.3g}" if auxk else "off"
    if checkpoint is None:
        yield "Checkpoint", "none yet"
    else:
        passes = f", {facts['passes']:.3g} passes" if "passes" in facts else ""
        yield "Activation width", f"{normalisers_of(own, checkpoint).widths.d_in:,}"
        again = facts.get("repeated_rows")
        repeated = f"; {again:,} were reread because some streams ended early" if again else ""
        yield "Rows trained", f"{facts['trained_rows']:,} of {own.rows:,}{passes}{repeated}"
        yield "Checkpoint", f"step {checkpoint.step:,} of {own.steps:,}"
        if (lineage := Lineage.from_scalars(checkpoint.scalars)).ancestors:
            rows = lineage.rows + facts["trained_rows"]
            yield "Continued from", lineage.describe()
            yield "Rows including earlier runs", f"{rows:,}"
        yield "Training time", format_duration(training_seconds(history, checkpoint.step))
    yield "Batch", f"{own.train.batch_rows:,} rows, peak learning rate {own.lr:.3g}"
    yield "Seeds", f"{own.train.seed} (dictionary), {own.activations.seed} (order of rows)"
    yield "Plan", facts["plan"][:16]
    yield "Run file", facts["run_file"]
    yield "Hardware of the report", hardware()
    yield "Versions", ", ".join(f"{name}\u00a0{v}" for name, v in versions().items())
    yield "Report created", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _model(model: ModelConfig) -> str:
    if isinstance(model, HuggingFaceModel):
        revision = f" @ {model.revision}" if model.revision else ""
        return f"{model.path}{revision}, {model.dtype}"
    return f"synthetic, {model.n_features:,} features, true L0 {model.l0:g}"


def _recipe(run: Run) -> str:
    sae = run.sae
    value = getattr(sae, sae.sparsity_key)
    sparsity = f"=\u00a0{value:g}" if isinstance(value, int | float) else "by\u00a0default"
    return f"{sae.kind}, {sae.n_latents:,} latents, {sae.sparsity_key}\u00a0{sparsity}"


def _documents(facts: Mapping[str, Any]) -> str:
    refused = facts["refused_documents"]
    left_out = f", {refused:,} refused by the tokenizer" if refused else ""
    heldout = f"{facts['heldout_documents']:,} held out"
    return f"{facts['train_documents']:,} to train on, {heldout}{left_out}"


def _excluded_rows(counts: Mapping[str, int]) -> str:
    # padding is not counted, because it makes no rows
    reasons = {reason: n for reason, n in counts.items() if n and reason != "padding"}
    return ", ".join(f"{reason.replace('_', ' ')} {n:,}" for reason, n in reasons.items()) or "none"
