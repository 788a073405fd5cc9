"""`dist-sae report`: one HTML file with a run's numbers, curves and latents."""

import json
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from dist_sae import __version__
from dist_sae.checkpoint.folder import begun_run
from dist_sae.checkpoint.lineage import Lineage
from dist_sae.checkpoint.trained import Trained, check_own, read_trained
from dist_sae.config import Run
from dist_sae.config.data import DatasetCorpus, FilesCorpus, HuggingFaceModel
from dist_sae.config.deciding import deciding
from dist_sae.data.loader import Units
from dist_sae.data.plan import Plan, load_plan
from dist_sae.data.shard import existing_units, read_manifest
from dist_sae.errors import CorpusError, ModelError
from dist_sae.reporting.latents import LatentView, view_latents
from dist_sae.reporting.page import Page, render_page
from dist_sae.reporting.void import void_settings
from dist_sae.storage import UNMETERED, Meter, ObjectStore, open_store
from dist_sae.telemetry.history import read_history

_RUN_FILE = "RUN.yaml"
_READERS = 16
_LIBRARIES = ("torch", "deepspeed", "transformers")


def report(run: Run, meter: Meter = UNMETERED) -> str:
    """Write `<run>/report/report.html` from whatever the run has so far.

    Args:
        run: The run.
        meter: Takes the metrics.

    Returns:
        Where the file is: a path, or the URL of an object.

    Raises:
        PlanMismatchError: The activation set has no plan, or one of other settings; or the run was
            trained with others.
    """
    runs = open_store(run.store.runs, run.store.s3, meter)
    activations = open_store(run.store.activations, run.store.s3, meter)
    plan = load_plan(activations, run)
    run = plan.resolve(run)
    trained = read_trained(runs, run)
    if trained is not None:
        trained.check_plan(plan.hash)
    elif begun := begun_run(runs, run.name):  # there may be curves already
        check_own(deciding(begun), run)
    units = Units(activations, plan, run.site, _no_waiting())
    latents, latent_rows, no_latents = _latents(run, units, trained)
    page = Page(
        title=run.name,
        facts=list(_facts(run, trained)),
        run_file=_RUN_FILE,
        evaluation=_evaluation(runs, run),
        history=read_history(runs, run.name),
        producer_seconds=_producer_seconds(activations, plan),
        void_settings=void_settings(run if trained is None else trained.run, plan),
        latents=latents,
        latent_rows=latent_rows,
        no_latents=no_latents,
    )
    key = report_key(run)
    runs.put(key, render_page(page).encode())
    return f"{runs.url}/{key}"


def report_key(run: Run) -> str:
    """Where the report is in the store of runs."""
    return f"{run.name}/report/report.html"


def _no_waiting() -> threading.Event:
    """For `Units`: a unit that is not there, or goes away, must not hold up the report."""
    stopping = threading.Event()
    stopping.set()
    return stopping


def _evaluation(runs: ObjectStore, run: Run) -> Mapping[str, Any] | None:
    key = f"{run.name}/evaluation.json"
    if runs.size(key) is None:
        return None
    numbers: Mapping[str, Any] = json.loads(runs.get(key))
    return numbers


def _latents(run: Run, units: Units, trained: Trained | None) -> tuple[list[LatentView], int, str]:
    """Latents, the rows they were looked for in, and why there are none."""
    if trained is None:
        return (
            [],
            0,
            f"No checkpoint yet: run dist-sae train {_RUN_FILE}, then make the report again.",
        )
    try:
        views, rows = view_latents(run, units, trained.sae, trained.scale)
    except (CorpusError, ModelError) as error:  # numbers and curves need no text
        return [], 0, f"The text cannot be shown: {error}"
    if not rows:
        return (
            [],
            0,
            f"No activations there: run dist-sae produce {_RUN_FILE}, then make the report again.",
        )
    return views, rows, f"No latent fires often enough in {rows} rows to be shown."


def _producer_seconds(activations: ObjectStore, plan: Plan) -> Mapping[str, float]:
    """Where the producers' time went, by stage, over the units that exist."""
    units = sorted(unit for unit in existing_units(activations) if unit < len(plan.units))
    seconds: dict[str, float] = {}
    with ThreadPoolExecutor(_READERS) as pool:  # a manifest from S3 takes tens of milliseconds
        for manifest in pool.map(lambda unit: read_manifest(activations, unit), units):
            for stage, spent in manifest.seconds.items():
                seconds[stage] = seconds.get(stage, 0.0) + spent
    return seconds


def _recipe(run: Run) -> str:
    sae = run.sae
    cost = f"k\u00a0=\u00a0{sae.k}" if hasattr(sae, "k") else f"sparsity\u00a0{sae.sparsity:g}"
    return f"{sae.kind}, {sae.n_latents:,} latents, {cost}"


def _facts(run: Run, trained: Trained | None) -> Iterator[tuple[str, str]]:
    model = run.model
    if isinstance(model, HuggingFaceModel):
        revision = f" @ {model.revision}" if model.revision else ""
        yield "Model", f"{model.path}{revision}, {model.dtype}"
    else:
        yield "Model", f"synthetic, {model.n_features:,} features, true L0 {model.l0:g}"
    yield "Site", run.site
    match run.corpus:
        case FilesCorpus(files=names):
            yield "Corpus", ", ".join(names)
        case DatasetCorpus(name=name):
            yield "Corpus", name
        case _:
            yield "Corpus", "synthetic"
    yield "Dictionary", _recipe(run)
    if trained is None:
        yield "Checkpoint", "none yet"
    else:
        yield "Activation width", f"{len(trained.mean):,}"
        yield "Rows trained", f"{trained.step * run.train.batch_rows:,} of {run.rows:,}"
        yield "Checkpoint", f"step {trained.step:,} of {run.steps:,}"
        if (lineage := Lineage.from_scalars(trained.checkpoint.scalars)).ancestors:
            rows = lineage.rows + trained.step * run.train.batch_rows
            yield "Goes on from", lineage.describe()
            yield "Rows with those before", f"{rows:,}"
    yield "Seeds", f"{run.train.seed} (dictionary), {run.activations.seed} (order of rows)"
    yield "Batch", f"{run.train.batch_rows:,} rows, peak learning rate {run.lr:.3g}"

    yield "Versions", _versions()
    yield "Report made", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _versions() -> str:
    found = [f"dist_sae {__version__}"]
    for library in _LIBRARIES:
        try:
            found.append(f"{library} {version(library)}")
        except PackageNotFoundError:  # transformers is not needed for the synthetic model
            continue
    return ", ".join(name.replace(" ", "\u00a0") for name in found)
