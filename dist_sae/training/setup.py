"""Sets a training run up: the stream of batches, and the jobs that train on it."""

import logging
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from itertools import chain

from dist_sae.checkpoint import warm_start
from dist_sae.checkpoint.folder import run_file_key
from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.checkpoint.saver import Saved, Saver
from dist_sae.checkpoint.state import TrainingState
from dist_sae.checkpoint.trained import normalisers_of
from dist_sae.config import Run, dump_run, with_absolute_paths
from dist_sae.config.fingerprint import as_begun, run_fingerprint
from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.backlog import ReadyUnits
from dist_sae.data.consumers import Consumers, Registration
from dist_sae.data.normaliser import measure
from dist_sae.data.plan import Plan, check_rows, load_plan
from dist_sae.data.streams import StreamCursor
from dist_sae.dictionaries import PRODUCT_DTYPES, build_sae
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.dead import DeadLatents
from dist_sae.dictionaries.ema import WeightAverage
from dist_sae.dictionaries.init import initialise_from_data
from dist_sae.dictionaries.interface import Rows
from dist_sae.dictionaries.normaliser import SiteNormalisers
from dist_sae.distributed.deepspeed_keys import check_deepspeed
from dist_sae.distributed.engine import DeepSpeedEngine
from dist_sae.distributed.mesh import Mesh
from dist_sae.distributed.watch import Watch
from dist_sae.errors import Stopped
from dist_sae.kernels import Kernels
from dist_sae.kernels.choice import choose_kernels
from dist_sae.precision import warn_if_emulated
from dist_sae.storage import ObjectStore, open_store
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.telemetry.sinks import open_sinks
from dist_sae.training.batches import Batches, StreamPosition, next_batch, open_loader
from dist_sae.training.clock import Times
from dist_sae.training.heldout import HeldoutFvu
from dist_sae.training.job import TrainingJob
from dist_sae.training.memory import check_memory
from dist_sae.training.reporter import TrainingReporter
from dist_sae.training.start import Start, find_start, restore
from dist_sae.training.void import void_settings

logger = logging.getLogger(__name__)


@contextmanager
def open_training(
    run: Run, mesh: Mesh, watch: Watch, stopping: threading.Event, telemetry: Telemetry
) -> Iterator[tuple[Batches, list[TrainingJob]]]:
    """Open a run's batches and jobs where they continue. See `train` for the arguments."""
    with ExitStack() as opened:
        yield _open(run, mesh, watch, stopping, telemetry, opened)


def _open(
    run: Run,
    mesh: Mesh,
    watch: Watch,
    stopping: threading.Event,
    telemetry: Telemetry,
    opened: ExitStack,
) -> tuple[Batches, list[TrainingJob]]:
    check_deepspeed(run)  # before anything is read or written
    kernels = choose_kernels(run.train.kernels, mesh.device)
    warn_if_emulated("train.products", run.train.products, mesh.device)
    times = Times(telemetry, mesh.device)
    runs, activations = (
        open_store(url, run.store.s3, telemetry, stopping)
        for url in (run.store.runs, run.store.activations)
    )
    plan = load_plan(activations, run)
    check_rows(plan.resolve(run), plan)
    activation_set = ActivationSet(activations, plan, run.sites, stopping)
    registration = opened.enter_context(_registration(run, plan, activations, mesh))
    checkpoints = Checkpoints(
        runs,
        run.name,
        run.train.keep_checkpoints,
        every=run.train.keep_every_steps,
        best=run.train.keep_best,
    )

    start = find_start(runs, run, plan, checkpoints, mesh)
    run = start.resolve(run, plan)
    if start.found:
        run = as_begun(run, start.found[0].scalars["run"])
    times.steps = run.steps
    start.check(run, plan)
    if mesh.is_first:
        for line in void_settings(run, plan):
            logger.warning("%s", line)
        runs.put(run_file_key(run.name), dump_run(with_absolute_paths(run)).encode())
    if not start.found:
        registration.begin(start.cursors)
    normalisers = _normalisers(run, activation_set, start, times)
    check_memory(run, normalisers.widths, mesh)
    state, engine = _build(run, mesh, kernels, activation_set, normalisers, start, times)
    position = _restore(state, start, checkpoints, registration, mesh, telemetry)
    logger.info(
        "%s at step %d of %d", "resuming" if position.step else "starting", position.step, run.steps
    )

    sinks = open_sinks(run, runs, position.step) if mesh.is_first else []
    report = TrainingReporter(
        run,
        mesh,
        telemetry,
        times,
        sinks,
        state,
        normalisers,
        position.step,
        start.lineage.counted_rows,
    )

    def on_durable(saved: Saved) -> None:
        cursors = {stream: StreamCursor(*place) for stream, place in saved.cursors.items()}
        registration.durable(cursors, ended=saved.step == run.steps)
        report.saved(saved)

    saver = Saver(
        checkpoints=checkpoints,
        state=state,
        scalars=normalisers.to_scalars()
        | {"plan": plan.hash, "run": run_fingerprint(run)}
        | start.lineage.to_scalars(),
        all_gather=mesh.in_background().all_gather_objects,
        first=mesh.is_first,
        before_commit=report.flush,
        on_durable=on_durable,
        last_step=position.step,
        background=run.train.save_in_background,
    )
    job = TrainingJob(
        run,
        mesh,
        watch,
        engine=engine,
        state=state,
        variance=normalisers.variance,
        lineage=start.lineage,
        report=report,
        heldout=HeldoutFvu(run, mesh, activation_set, normalisers),
        saver=saver,
        steps_done=position.step,
    )
    steps = range(position.step, run.steps)
    loader = open_loader(run, mesh, activation_set, steps, start.lineage, position.cursors)
    batches = Batches(
        run,
        mesh,
        watch,
        loader,
        normalisers=normalisers,
        registration=registration,
        position=position,
        times=times,
        telemetry=telemetry,
        stopping=stopping,
    )
    for each in (report, saver, _ready_units(activation_set, mesh, telemetry, batches), loader):
        opened.enter_context(each)
    times.end("begin")
    return batches, [job]


def _registration(run: Run, plan: Plan, activations: ObjectStore, mesh: Mesh) -> Registration:
    store = run.store
    return Registration(
        Consumers(activations, store.consumer_expiry_hours),
        plan,
        run.name,
        keeps=run.train.max_passes > 1,
        retires=store.retention == "delete_consumed",
        speaks=mesh.is_first,
    )


def _ready_units(
    activation_set: ActivationSet, mesh: Mesh, telemetry: Telemetry, batches: Batches
) -> AbstractContextManager[object]:
    """Count the units that exist, on rank 0."""
    if not mesh.is_first:
        return nullcontext()
    telemetry.set("dist_sae_train_plan_units", len(activation_set.plan.train_units))
    return ReadyUnits(activation_set.store, activation_set.plan, batches.show_ready)


def _normalisers(
    run: Run, activation_set: ActivationSet, start: Start, times: Times
) -> SiteNormalisers:
    """The stored normalisers of this activation set, or new ones at the parent's scales."""
    if known := start.knows_rows_of(activation_set.plan):
        return normalisers_of(run, known)
    times.end("begin")
    assert run.train.normaliser_rows is not None, "the plan resolves it"
    measured = measure(activation_set, run.train.normaliser_rows, times.waiting)
    times.end("wait")
    normalisers = SiteNormalisers(run.reads, run.writes, measured)
    return normalisers.at_scales(start.parent.scalars) if start.parent else normalisers


def _build(
    run: Run,
    mesh: Mesh,
    kernels: Kernels,
    activation_set: ActivationSet,
    normalisers: SiteNormalisers,
    start: Start,
    times: Times,
) -> tuple[TrainingState, DeepSpeedEngine]:
    """Build the dictionary, initialised or from the parent, with its engine, counts and average."""
    sae = build_sae(
        run.sae, normalisers.widths, mesh.axis, kernels, PRODUCT_DTYPES[run.train.products]
    ).to(mesh.device)
    if start.parent and warm_start.width(start.parent) == sae.n_latents:
        warm_start.load(sae, start.parent)
    elif not start.found:
        initialise(run, mesh, activation_set, normalisers, sae, start, times)
    engine = DeepSpeedEngine(run, sae, mesh)
    dead = DeadLatents(len(sae.W_enc), run.dead_after_rows, mesh.axis, mesh.device)
    average = WeightAverage(sae, run.train.ema_decay) if run.train.ema_decay else None
    return TrainingState(sae, engine, dead, average), engine


def initialise(
    run: Run,
    mesh: Mesh,
    activation_set: ActivationSet,
    normalisers: SiteNormalisers,
    sae: Dictionary,
    start: Start,
    times: Times,
) -> None:
    """Initialise a new dictionary from the first batch; use as many batches as needed. Collective.

    Latents that a parent does not give take directions from rows, one row for each latent.
    """
    parent = start.parent
    known = warm_start.width(parent) if parent else 0
    n_rows = start.init_rows(run)
    n_batches = max(1, -(-n_rows // run.train.batch_rows))

    def rows() -> Generator[Rows]:
        with open_loader(
            run, mesh, activation_set, range(n_batches), start.lineage, start.cursors
        ) as loader:
            for _ in range(n_batches):
                times.end("begin")
                batch = next_batch(loader, mesh, activation_set.stopping, times)
                if batch is None:
                    loader.raise_if_failed()
                    raise Stopped("stopped before the first step; start again to continue")
                yield normalisers.rows(batch.acts, mesh.device)

    with closing(rows()) as batches:
        first = next(batches)
        sae.initialise(first, run.train.seed)
        if parent:
            warm_start.load(sae, parent)
        if n_rows:
            initialise_from_data(sae, chain([first], batches), known)


def _restore(
    state: TrainingState,
    start: Start,
    checkpoints: Checkpoints,
    registration: Registration,
    mesh: Mesh,
    telemetry: Telemetry,
) -> StreamPosition:
    """Load the run's checkpoint, or a parent's optimiser state; return where the stream is."""
    if start.parent and start.lineage.updates:
        state.read(start.parent)()
    if not start.found:
        return StreamPosition(0, start.cursors, 0)
    position = restore(state, start.found, checkpoints, mesh, telemetry)
    durable_at = time.time() - checkpoints.ages()[position.step]
    telemetry.set("dist_sae_checkpoint_step", position.step)
    telemetry.set("dist_sae_checkpoint_timestamp_seconds", durable_at)
    registration.begin(position.cursors)
    return position
