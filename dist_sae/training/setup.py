"""How training begins: from the newest checkpoint, from another run's, or from rows alone."""

import logging
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from itertools import chain
from typing import NamedTuple

import torch

from dist_sae.checkpoint import warm_start
from dist_sae.checkpoint.folder import run_file_key
from dist_sae.checkpoint.layout import Checkpoint, Checkpoints
from dist_sae.checkpoint.lineage import Lineage
from dist_sae.checkpoint.state import TrainingState
from dist_sae.config import Run, dump_run
from dist_sae.config.fingerprint import as_begun, check_same_run
from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.consumers import Consumers, Registration
from dist_sae.data.loader import Batch, Loader
from dist_sae.data.normaliser import Normaliser, measure
from dist_sae.data.plan import Plan, check_rows, load_plan
from dist_sae.data.streams import StreamCursor
from dist_sae.dictionaries import PRODUCT_DTYPES, build_sae
from dist_sae.dictionaries.base import Dictionary, Rows
from dist_sae.dictionaries.dead import DeadLatents
from dist_sae.dictionaries.ema import WeightAverage
from dist_sae.dictionaries.init import initialise_from_data
from dist_sae.distributed.deepspeed_keys import check_deepspeed
from dist_sae.distributed.engine import DeepSpeedEngine
from dist_sae.distributed.mesh import Mesh
from dist_sae.errors import CorruptObjectError, ObjectNotFoundError, PlanMismatchError, Stopped
from dist_sae.kernels.choice import choose_kernels
from dist_sae.precision import warn_if_emulated
from dist_sae.storage import ObjectStore, open_store
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.training.clock import Times
from dist_sae.training.start import Start, cursors_of
from dist_sae.training.void import void_settings

logger = logging.getLogger(__name__)


class Job(NamedTuple):
    """Everything that the training loop needs."""

    run: Run
    runs: ObjectStore
    units: ActivationSet
    checkpoints: Checkpoints
    registration: Registration
    normaliser: Normaliser
    engine: DeepSpeedEngine
    state: TrainingState
    lineage: Lineage
    step: int
    cursors: Mapping[int, StreamCursor]
    repeated_rows: int
    """Rows that were read again before, because streams had ended."""


def begin(
    run: Run, mesh: Mesh, stopping: threading.Event, telemetry: Telemetry, times: Times
) -> Job:
    """From the newest checkpoint that is whole, or the parent's, or else from the beginning."""
    check_deepspeed(run)  # before anything is read or written
    kernels = choose_kernels(run.train.kernels, mesh.device)
    warn_if_emulated("train.products", run.train.products, mesh.device)
    runs, activations = (
        open_store(url, run.store.s3, telemetry, stopping)
        for url in (run.store.runs, run.store.activations)
    )
    plan = load_plan(activations, run)
    asked, run = run, plan.resolve(run)
    check_rows(run, plan)
    units = ActivationSet(activations, plan, run.site, stopping)
    checkpoints = Checkpoints(
        runs,
        run.name,
        run.train.keep_checkpoints,
        every=run.train.keep_every_steps,
        best=run.train.keep_best,
    )
    registration = _registration(run, plan, activations, mesh)

    start = _start(runs, asked, plan, checkpoints, mesh)
    run = start.resolve(asked, plan)
    times.steps = run.steps
    if start.found:
        run = as_begun(run, start.found[0].scalars["run"])
    start.check(run, plan)
    if mesh.is_first:
        for line in void_settings(run, plan):
            logger.warning("%s", line)
        runs.put(run_file_key(run.name), dump_run(run).encode())
    if not start.found:
        registration.begin(start.cursors)
    normaliser = _normaliser(run, units, start, times)
    sae = build_sae(
        run.sae, len(normaliser.mean), mesh.axis, kernels, PRODUCT_DTYPES[run.train.products]
    ).to(mesh.device)
    if start.parent and warm_start.width(start.parent) == sae.n_latents:
        warm_start.load(sae, start.parent)
    elif not start.found:
        _initialise(run, mesh, units, normaliser, sae, start, times)
    engine = DeepSpeedEngine(run, sae, mesh)
    dead = DeadLatents(len(sae.W_enc), run.dead_after_rows, mesh.axis, mesh.device)
    average = WeightAverage(sae, run.train.ema_decay) if run.train.ema_decay else None
    state = TrainingState(sae, engine, dead, average)
    step, cursors, repeated_rows = 0, start.cursors, 0
    if start.parent and start.lineage.updates:
        state.read(start.parent)()
    if start.found:
        checkpoint = _restore(state, start.found, checkpoints, mesh, telemetry)
        step, cursors = checkpoint.step, cursors_of(checkpoint)
        repeated_rows = checkpoint.scalars.get("repeated_rows", 0)
        durable_at = time.time() - checkpoints.age_seconds(step)
        telemetry.set("dist_sae_checkpoint_step", step)
        telemetry.set("dist_sae_checkpoint_timestamp_seconds", durable_at)
        registration.begin(cursors)
    return Job(
        run,
        runs,
        units,
        checkpoints,
        registration,
        normaliser,
        engine,
        state,
        start.lineage,
        step,
        cursors,
        repeated_rows,
    )


def _start(runs: ObjectStore, run: Run, plan: Plan, checkpoints: Checkpoints, mesh: Mesh) -> Start:
    """Collective: all ranks go on from the same.

    Raises:
        Stopped: They found different ones.
    """
    if found := _found(checkpoints, runs, run, plan, mesh):
        return Start.of_own(found)
    start = Start.of_others(runs, run, plan)
    if len(set(mesh.all_gather_objects(start.parent and start.parent.step))) > 1:
        raise Stopped(f"{run.name}: its parent was written while the ranks began; start again")
    if start.parent:
        logger.info("goes on from %s", start.lineage.describe())
    return start


def _normaliser(run: Run, units: ActivationSet, start: Start, times: Times) -> Normaliser:
    """Its own, or its parent's on the same data; else it is measured, and a parent's scale kept."""
    if known := start.knows_rows_of(units.plan):
        return Normaliser.from_scalars(known.scalars)
    times.end("begin")
    assert run.train.normaliser_rows is not None, "the plan resolves it"
    normaliser = measure(units, run.train.normaliser_rows, times.waiting)
    times.end("wait")
    return normaliser.at(start.parent.scalars["scale"]) if start.parent else normaliser


def _initialise(
    run: Run,
    mesh: Mesh,
    units: ActivationSet,
    normaliser: Normaliser,
    sae: Dictionary,
    start: Start,
    times: Times,
) -> None:
    """The initial dictionary, from the first batch, or as many as it wants directions from."""
    parent = start.parent
    known = warm_start.width(parent) if parent else 0
    n_rows = start.init_rows(run)
    n_batches = max(1, -(-n_rows // run.train.batch_rows))

    def rows() -> Generator[Rows]:
        with open_loader(
            run, mesh, units, range(n_batches), start.lineage, start.cursors
        ) as loader:
            for _ in range(n_batches):
                times.end("begin")
                batch = next_batch(loader, mesh, units.stopping, times)
                if batch is None:
                    loader.raise_if_failed()
                    raise Stopped("stopped before the first step; start again to go on")
                x = batch.acts.to(mesh.device, torch.float32) * normaliser.scale
                yield Rows(inputs=x, targets=x)

    with closing(rows()) as batches:
        first = next(batches)
        sae.initialise(first, run.train.seed)
        if parent:
            warm_start.load(sae, parent)
        if n_rows:
            initialise_from_data(sae, chain([first], batches), known)


def _found(
    checkpoints: Checkpoints, runs: ObjectStore, run: Run, plan: Plan, mesh: Mesh
) -> list[Checkpoint]:
    """The checkpoints to go on from, the newest first; none at the beginning. Collective.

    Those whose manifest every rank could read: they must not go on from different ones.

    Raises:
        CorruptObjectError: There are some, and not one has a manifest that is whole.
        PlanMismatchError: They are of a run with other settings, or on another activation set.
    """
    found = list(checkpoints.newest_first())
    on_all = set.intersection(*mesh.all_gather_objects({checkpoint.step for checkpoint in found}))
    found = [checkpoint for checkpoint in found if checkpoint.step in on_all]
    if not found and checkpoints.steps():
        raise CorruptObjectError(
            "no checkpoint is whole; restore one, or train under another name",
            url=runs.url,
            key=run.name,
        )
    windows = range(0, plan.n_train_units // plan.streams, plan.window_units)
    for checkpoint in found:
        remedy = (
            f"restore them, or choose another name: `--set name=OTHER --from {run.name}` goes on "
            f"from this run"
        )
        resolved = plan.resolve(run, Lineage.from_scalars(checkpoint.scalars).stream_rows)
        check_same_run(checkpoint.scalars["run"], resolved, f"{runs.url}/{run.name}", remedy)
        if checkpoint.scalars["plan"] != plan.hash or not all(
            stream < plan.streams and place.first in windows
            for stream, place in cursors_of(checkpoint).items()
        ):
            raise PlanMismatchError(
                f"{run.store.runs}/{run.name}: was trained on another activation set than "
                f"{run.store.activations}; restore store.activations or choose another name"
            )
    return found


def _restore(
    state: TrainingState,
    found: Sequence[Checkpoint],
    checkpoints: Checkpoints,
    mesh: Mesh,
    telemetry: Telemetry,
) -> Checkpoint:
    """Put the run back to the first of these checkpoints that all ranks find whole.

    Raises:
        CorruptObjectError: There is none.
    """
    for checkpoint in found:
        damage: CorruptObjectError | ObjectNotFoundError | None = None
        try:
            take = state.read(checkpoint)
        except (CorruptObjectError, ObjectNotFoundError) as exc:
            damage = exc
        if mesh.any_rank(damage is not None):
            if damage is not None:
                logger.error("%s; the checkpoint before is taken", damage)
            continue
        take()
        if mesh.is_first:  # later ones are damaged, and would be the newest again
            for step in checkpoints.steps():
                if step > checkpoint.step:
                    telemetry.add("dist_sae_checkpoint_damaged_total", 1)
                    checkpoints.delete(step)
        return checkpoint
    raise CorruptObjectError(
        "no checkpoint is whole; restore one, or train under another name",
        url=checkpoint.store.url,
    )


def _registration(run: Run, plan: Plan, activations: ObjectStore, mesh: Mesh) -> Registration:
    """How the store knows what this run still needs."""
    store = run.store
    return Registration(
        Consumers(activations, store.consumer_expiry_hours),
        plan,
        run.name,
        keeps=run.train.max_passes > 1,
        retires=store.retention == "delete_consumed",
        speaks=mesh.is_first,
    )


def open_loader(
    run: Run,
    mesh: Mesh,
    units: ActivationSet,
    steps: range,
    lineage: Lineage,
    cursors: Mapping[int, StreamCursor] | None,
) -> Loader:
    """This rank's share of the batches of these steps."""
    return Loader(
        units,
        rank=mesh.rank,
        world=mesh.world,
        batch_rows=run.train.batch_rows,
        steps=steps,
        max_passes=run.train.max_passes,
        cursors=cursors,
        stream_rows=lineage.stream_rows,
    )


def next_batch(loader: Loader, mesh: Mesh, stopping: threading.Event, times: Times) -> Batch | None:
    """The next batch, when all ranks have theirs; None if one has none or is to stop. Collective.

    While one waits for its data all do.
    """
    batch = loader.next(times.waiting)
    waited = batch.waited_seconds if batch else 0.0
    times.end("wait")
    ends, longest = mesh.any_rank_and_max(batch is None or stopping.is_set(), waited)
    times.end("ranks", waited=longest - waited)
    return None if ends else batch
