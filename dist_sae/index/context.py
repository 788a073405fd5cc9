"""Opening an index for a worker: the first worker creates it, later workers join."""

import logging
import threading
from typing import NamedTuple

from dist_sae.checkpoint.layout import Checkpoint
from dist_sae.checkpoint.trained import (
    find_checkpoint,
    no_checkpoint_error,
    normalisers_of,
    trained_run,
)
from dist_sae.config import Run
from dist_sae.config.data import ModelConfig
from dist_sae.data.consumers import kept_units
from dist_sae.data.plan import Plan, load_plan
from dist_sae.dictionaries.normaliser import SiteNormalisers
from dist_sae.errors import ConfigError, ObjectNotFoundError, PlanMismatchError
from dist_sae.index.layout import (
    IndexFolder,
    IndexManifest,
    bucket_latents,
    index_name,
    read_manifest,
)
from dist_sae.index.outputs import head_digest, open_outputs
from dist_sae.storage import ObjectStore, open_store
from dist_sae.storage.records import seal
from dist_sae.telemetry.exporter import Telemetry

logger = logging.getLogger(__name__)


class IndexContext(NamedTuple):
    """An index that is being built, and what it is built from."""

    store: ObjectStore
    folder: IndexFolder
    manifest: IndexManifest
    run: Run
    """Settings of the training run."""
    checkpoint: Checkpoint
    activations: ObjectStore
    plan: Plan
    model: ModelConfig
    """The model, at the path that the worker's run file names."""

    @property
    def normalisers(self) -> SiteNormalisers:
        """The normalisers of the dictionary's sites."""
        return normalisers_of(self.run, self.checkpoint)

    @property
    def neighbours(self) -> int:
        """Number of nearest latents that are stored per latent; 0 if they do not exist."""
        return int(self.manifest.settings["neighbours"]) if self.manifest.compared else 0


def open_index(
    run: Run, worker: str, stopping: threading.Event, telemetry: Telemetry, step: int | None
) -> IndexContext:
    """Create an index, or join the workers of an existing one. Raises the errors of `index`."""
    runs = open_store(run.store.runs, run.store.s3, telemetry, stopping)
    store = open_store(run.store.activations, run.store.s3, telemetry, stopping)
    checkpoint = find_checkpoint(runs, run, step)
    if checkpoint is None:
        raise no_checkpoint_error(runs, run)
    trained = trained_run(checkpoint, run)
    plan = load_plan(store, run)
    if checkpoint.scalars["plan"] != plan.hash:
        raise PlanMismatchError(
            f"{runs.url}/{run.name}: was trained on a different activation set than {store.url}; "
            f"restore store.activations"
        )
    name = index_name(run, checkpoint.step)
    folder = IndexFolder(run.name, name)
    manifest = _manifest(run, trained, plan, store, checkpoint, name, worker)
    normalisers, existing = normalisers_of(trained, checkpoint), _read_existing(runs, folder)
    if existing is None:
        head = head_digest(run.model, manifest, normalisers)
        manifest = manifest.model_copy(update={"head": head})
        if not runs.put(folder.manifest, seal(manifest), if_absent=True):
            existing = _read_existing(runs, folder)
    if existing is not None:
        _check_same(existing, manifest, f"{runs.url}/{folder.prefix}")
        manifest = existing
        if len(set(folder.buckets.numbers(runs))) < manifest.n_buckets:
            # fails now if this worker has another head, not after all units are encoded
            open_outputs(run.model, manifest, normalisers)
    if manifest.deleted:
        logger.warning(
            "units %s were deleted (store.retention) and are not in the index",
            _ranges(manifest.deleted),
        )
    return IndexContext(runs, folder, manifest, trained, checkpoint, store, plan, run.model)


def _read_existing(runs: ObjectStore, folder: IndexFolder) -> IndexManifest | None:
    """Read the manifest of an index. Return None if no worker has begun the index."""
    try:
        return read_manifest(runs, folder)
    except ObjectNotFoundError:
        return None


def _manifest(
    run: Run,
    trained: Run,
    plan: Plan,
    store: ObjectStore,
    checkpoint: Checkpoint,
    name: str,
    worker: str,
) -> IndexManifest:
    kept = kept_units(store, plan)
    units, rows = list[int](), 0
    for unit in (*plan.heldout_units, *kept):
        if run.index.rows != "all" and rows >= run.index.rows:
            break
        units.append(unit)
        rows += plan.rows_of_units[unit]
    if not units:
        raise ConfigError(
            f"{store.url}: all {len(plan.units)} units were deleted (store.retention) and none "
            f"is held out, so there are no rows to index; change "
            f"activations.heldout_share or store.retention"
        )
    return IndexManifest(
        name=name,
        run=run.name,
        created_by=worker,
        step=checkpoint.step,
        checkpoint=checkpoint.digest,
        plan=plan.hash,
        site=trained.site,
        scale=normalisers_of(trained, checkpoint).by_site[trained.site].scale,
        writes=trained.writes if len(trained.writes) > 1 else (),
        compared=trained.sae.has_latent_rows,
        n_latents=trained.sae.n_latents,
        bucket_latents=bucket_latents(trained.sae.n_latents),
        units=tuple(sorted(units)),
        deleted=tuple(plan.train_units[: kept.start]),
        planned_rows=rows,
        settings=run.index.deciding(),
        seed=trained.train.seed,
    )


def _check_same(existing: IndexManifest, wanted: IndexManifest, place: str) -> None:
    if existing.checkpoint != wanted.checkpoint:
        raise ConfigError(
            f"{place}: belongs to step {existing.step}, not {wanted.step}; set a different "
            f"index.name, or use --step {existing.step}"
        )
    changed = [key for key in wanted.settings if existing.settings.get(key) != wanted.settings[key]]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"{place}: was created with index.{key} = {existing.settings.get(key)}, not "
            f"{wanted.settings[key]}; change it back, or set a different index.name"
        )


def _ranges(units: tuple[int, ...]) -> str:
    return f"{units[0]} to {units[-1]}" if len(units) > 1 else str(units[0])
