"""Sets training up: the stream of batches, and the jobs that train on it."""

import logging
import threading
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import chain
from typing import NamedTuple

from dist_sae.checkpoint import warm_start
from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.checkpoint.run_folder import run_file_key
from dist_sae.checkpoint.saver import Saved, Saver, saver_thread
from dist_sae.checkpoint.state import TrainingState
from dist_sae.checkpoint.trained import normalisers_of
from dist_sae.config import Run, dump_run, with_absolute_paths
from dist_sae.config.fingerprint import as_begun, run_fingerprint
from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.backlog import ReadyUnits
from dist_sae.data.consumers import Consumers, Registration
from dist_sae.data.loader import Loader
from dist_sae.data.normaliser import measure
from dist_sae.data.plan import Plan, check_rows, load_plan
from dist_sae.data.streams import StreamCursor
from dist_sae.dictionaries import PRODUCT_DTYPES, build_sae
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.dead import DeadLatents
from dist_sae.dictionaries.ema import WeightAverage
from dist_sae.dictionaries.init import initialise_from_data
from dist_sae.dictionaries.normaliser import Normaliser, SiteNormalisers
from dist_sae.distributed.deepspeed_keys import check_deepspeed
from dist_sae.distributed.engine import DeepSpeedEngine
from dist_sae.distributed.mesh import Mesh
from dist_sae.distributed.watch import Watch
from dist_sae.errors import ConfigError
from dist_sae.kernels import Kernels
from dist_sae.kernels.choice import choose_kernels
from dist_sae.precision import warn_if_emulated
from dist_sae.storage import ObjectStore, open_store
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.telemetry.sinks import open_sinks
from dist_sae.training.batches import Batches, FirstBatches, StreamPosition, open_loader
from dist_sae.training.clock import Times
from dist_sae.training.heldout import HeldoutFvu
from dist_sae.training.ineffective import ineffective_settings
from dist_sae.training.job import TrainingJob
from dist_sae.training.memory import check_memory
from dist_sae.training.reporter import TrainingReporter
from dist_sae.training.start import Start, find_start, restore

logger = logging.getLogger(__name__)


@contextmanager
def open_training(
    runs: Sequence[Run],
    mesh: Mesh,
    watch: Watch,
    stopping: threading.Event,
    telemetry: Telemetry,
    *,
    is_sweep: bool,
) -> Iterator[tuple[Batches, list[TrainingJob]]]:
    """Open the batches and jobs of runs that read one stream, each at the step it continues from.

    Args:
        runs: The jobs of a sweep that are not complete, or one run.
        is_sweep: Whether the runs belong to a sweep. If so, a job that fails does not stop others.

    See `train` for the other arguments.
    """
    with ExitStack() as opened:
        yield _open(runs, mesh, watch, stopping, telemetry, opened, is_sweep=is_sweep)


class _PreparedRun(NamedTuple):
    """A run and where it continues from, before its dictionary is built."""

    run: Run
    """The run, resolved by the plan."""
    mesh: Mesh
    """The ranks, arranged in the run's number of latent shards."""
    kernels: Kernels
    telemetry: Telemetry
    """Exporter of the run's series."""
    registration: Registration
    checkpoints: Checkpoints
    start: Start


def _open(
    runs: Sequence[Run],
    mesh: Mesh,
    watch: Watch,
    stopping: threading.Event,
    telemetry: Telemetry,
    opened: ExitStack,
    *,
    is_sweep: bool,
) -> tuple[Batches, list[TrainingJob]]:
    shared = runs[0]  # all runs have the same settings for the stream
    for run in runs:
        check_deepspeed(run)  # before anything is read or written
        warn_if_emulated("train.products", run.train.products, mesh.device)
    telemetry.device = mesh.device
    of_each = {run.name: telemetry.of_runs(run.name) for run in runs}
    times = Times(mesh.device, of_each)
    stores = [
        open_store(url, shared.store.s3, telemetry, stopping)
        for url in (shared.store.runs, shared.store.activations)
    ]
    plan = load_plan(stores[1], shared)
    sites = tuple(dict.fromkeys(site for run in runs for site in run.sites))
    activation_set = ActivationSet(stores[1], plan, sites, stopping)
    prepared = [
        _prepare(run, mesh, of_each[run.name], activation_set, stores[0], opened) for run in runs
    ]
    if mesh.is_first:
        for line in dict.fromkeys(
            line for job in prepared for line in ineffective_settings(job.run, plan)
        ):
            logger.warning("%s", line)
    first = prepared[0].start.lineage
    for other in prepared:
        if other.start.lineage.stream_rows != first.stream_rows:
            raise ConfigError(
                f"{other.run.name}: its parent's checkpoint is not at the same stream position as "
                f"that of {prepared[0].run.name}; set train.parent.step"
            )
    times.steps = max(job.run.steps for job in prepared)
    normalisers = _normalisers(prepared, activation_set, times)
    check_memory([(job.run, normalisers[job.run.name].widths, job.mesh) for job in prepared], mesh)

    def open_(steps: range, cursors: Mapping[int, StreamCursor]) -> Loader:
        return open_loader(shared, mesh, activation_set, steps, first, cursors)

    reading = opened.enter_context(ExitStack())
    new = [job for job in prepared if not job.start.found]
    first_batches = None
    if new:  # after the normalisers: reads of their manifests would queue behind blocks of batches
        loader = reading.enter_context(open_(range(times.steps), new[0].start.cursors))
        n = max(init_batches(job.run, job.start) for job in new)
        several = len(new) > 1
        first_batches = FirstBatches(n, loader, mesh, stopping, times, several=several)
    thread = opened.enter_context(saver_thread())
    heldout: dict[Hashable, HeldoutFvu] = {}
    jobs = []
    for each in prepared:
        own = normalisers[each.run.name]
        state, engine = _build(each, own, first_batches)
        key = each.run.train.heldout_rows, own.key
        if key not in heldout:
            heldout[key] = HeldoutFvu(each.run, mesh, activation_set, own)
        position = _restore(each, state)
        role = f"train {each.run.name}" if is_sweep else "train"
        report = _reporter(each, times, state, own, position, stores[0], role)
        job = TrainingJob(
            each.run,
            each.mesh,
            watch,
            engine=engine,
            state=state,
            normalisers=own,
            registration=each.registration,
            lineage=each.start.lineage,
            report=report,
            heldout=heldout[key],
            saver=_saver(each, plan, state, own, report, position, thread),
            position=position,
            alone=not is_sweep,
        )
        opened.enter_context(report)
        opened.enter_context(job.saver)
        jobs.append(job)
    batches = Batches(
        mesh,
        watch,
        jobs,
        open_,
        reading,
        times=times,
        telemetry=telemetry.of_runs(*of_each),
        stopping=stopping,
        loader=first_batches.loader() if first_batches else None,
    )
    opened.enter_context(_ready_units(activation_set, mesh, batches))
    times.end("begin")
    return batches, jobs


def _prepare(
    run: Run,
    mesh: Mesh,
    telemetry: Telemetry,
    activation_set: ActivationSet,
    runs: ObjectStore,
    opened: ExitStack,
) -> _PreparedRun:
    """Find where a run continues, register it and write its run file. Collective."""
    plan = activation_set.plan
    check_rows(plan.resolve(run), plan)
    kernels = choose_kernels(run.train.kernels, mesh.device)
    registration = opened.enter_context(_registration(run, plan, activation_set.store, mesh))
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
    start.check(run, plan)
    if mesh.is_first:
        runs.put(run_file_key(run.name), dump_run(with_absolute_paths(run)).encode())
    if not start.found:
        registration.register(start.cursors)
    own = mesh.sharded(run.processes.latent_shards)
    return _PreparedRun(run, own, kernels, telemetry, registration, checkpoints, start)


def _reporter(
    prepared: _PreparedRun,
    times: Times,
    state: TrainingState,
    normalisers: SiteNormalisers,
    position: StreamPosition,
    runs: ObjectStore,
    role: str,
) -> TrainingReporter:
    run, mesh = prepared.run, prepared.mesh
    logger.info(
        "%s: %s at step %d of %d",
        run.name,
        "resuming" if position.step else "starting",
        position.step,
        run.steps,
    )
    return TrainingReporter(
        run,
        mesh,
        prepared.telemetry,
        times,
        open_sinks(run, runs, position.step) if mesh.is_first else [],
        state,
        normalisers,
        position.step,
        role,
        prepared.start.lineage.counted_rows,
    )


def _saver(
    prepared: _PreparedRun,
    plan: Plan,
    state: TrainingState,
    normalisers: SiteNormalisers,
    report: TrainingReporter,
    position: StreamPosition,
    thread: ThreadPoolExecutor,
) -> Saver:
    run, mesh = prepared.run, prepared.mesh

    def on_durable(saved: Saved) -> None:
        cursors = {stream: StreamCursor(*place) for stream, place in saved.cursors.items()}
        prepared.registration.checkpointed(cursors, ended=saved.step == run.steps)
        report.saved(saved)

    return Saver(
        checkpoints=prepared.checkpoints,
        state=state,
        scalars=normalisers.to_scalars()
        | {"plan": plan.hash, "run": run_fingerprint(run)}
        | prepared.start.lineage.to_scalars(),
        all_gather=mesh.in_background().all_gather_objects,
        writes_manifest=mesh.is_first,
        before_commit=report.flush,
        on_durable=on_durable,
        last_step=position.step,
        background=run.train.save_in_background,
        thread=thread,
    )


def _registration(run: Run, plan: Plan, activations: ObjectStore, mesh: Mesh) -> Registration:
    store = run.store
    return Registration(
        Consumers(activations, store.consumer_expiry_hours),
        plan,
        run.name,
        multi_pass=run.train.max_passes > 1,
        retires=store.retention == "delete_consumed",
        reports=mesh.is_first,
    )


def _ready_units(
    activation_set: ActivationSet, mesh: Mesh, batches: Batches
) -> AbstractContextManager[object]:
    """Count the existing units in a thread, on rank 0 only."""
    if not mesh.is_first:
        return nullcontext()
    batches.telemetry.set("dist_sae_train_plan_units", len(activation_set.plan.train_units))
    return ReadyUnits(activation_set.store, activation_set.plan, batches.show_ready)


def _normalisers(
    prepared: Sequence[_PreparedRun], activation_set: ActivationSet, times: Times
) -> dict[str, SiteNormalisers]:
    """Return each job's normalisers: stored ones if measured on this activation set, or new ones.

    New normalisers are measured once for all jobs. A child's are converted to its parent's scales.
    """
    measured: dict[str, Normaliser] = {}
    found = {}
    for each in prepared:
        run, start = each.run, each.start
        if known := start.normaliser_checkpoint(activation_set.plan):
            found[run.name] = normalisers_of(run, known)
            continue
        if not measured:
            times.end("begin")
            assert run.train.normaliser_rows is not None, "the plan resolves it"
            measured = measure(activation_set, run.train.normaliser_rows, times.report_wait)
            times.end("wait")
        of = {site: measured[site] for site in run.sites}
        own = SiteNormalisers(run.reads, run.writes, of)
        found[run.name] = own.at_scales(start.parent.scalars) if start.parent else own
    return found


def _build(
    prepared: _PreparedRun, normalisers: SiteNormalisers, first_batches: FirstBatches | None
) -> tuple[TrainingState, DeepSpeedEngine]:
    """Build the dictionary, its engine, its counts of dead latents and its running average.

    A new dictionary is initialized from the parent or from the first batches.
    """
    run, mesh, start = prepared.run, prepared.mesh, prepared.start
    sae = build_sae(
        run.sae, normalisers.widths, mesh.axis, prepared.kernels, PRODUCT_DTYPES[run.train.products]
    ).to(mesh.device)
    if start.parent and warm_start.width(start.parent) == sae.n_latents:
        warm_start.load(sae, start.parent)
    elif not start.found:
        assert first_batches is not None, "opened for every new dictionary"
        initialise(run, normalisers, sae, start, first_batches)
    engine = DeepSpeedEngine(run, sae, mesh)
    dead = DeadLatents(
        len(sae.W_enc), run.dead_after_rows, mesh.axis, mesh.device, layers=sae.layers
    )
    average = WeightAverage(sae, run.train.ema_decay) if run.train.ema_decay else None
    return TrainingState(sae, engine, dead, average), engine


def initialise(
    run: Run,
    normalisers: SiteNormalisers,
    sae: Dictionary,
    start: Start,
    first_batches: FirstBatches,
) -> None:
    """Initialize a new dictionary from the first batch, and more batches if needed. Collective.

    Latents that are initialized from data need one row each. If there is a parent, these are the
    latents that it does not have; otherwise, the recipe decides.
    """
    parent = start.parent
    known = warm_start.width(parent) if parent else 0
    batches = first_batches.rows(init_batches(run, start), normalisers)
    first = next(batches)
    turns = start.init_rows(run) > 0
    sae.initialise(first, run.train.seed, rescale=not turns or parent is not None)
    if parent:
        warm_start.load(sae, parent)
    if turns:
        initialise_from_data(sae, chain([first], batches), known)


def init_batches(run: Run, start: Start) -> int:
    """Return the number of batches that initialize a new dictionary."""
    return max(1, -(-start.init_rows(run) // run.train.batch_rows))


def _restore(prepared: _PreparedRun, state: TrainingState) -> StreamPosition:
    """Load the run's checkpoint or a parent's optimizer state, and return the stream position."""
    start, checkpoints, telemetry = prepared.start, prepared.checkpoints, prepared.telemetry
    if start.parent and start.lineage.updates:
        state.read(start.parent)()
    if not start.found:
        return StreamPosition(0, start.cursors, 0)
    position = restore(state, start.found, checkpoints, prepared.mesh, telemetry)
    durable_at = time.time() - checkpoints.ages()[position.step]
    telemetry.set("dist_sae_checkpoint_step", position.step)
    telemetry.set("dist_sae_checkpoint_timestamp_seconds", durable_at)
    prepared.registration.register(position.cursors, ended=position.step == prepared.run.steps)
    return position
