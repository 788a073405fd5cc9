"""`dist-sae train`: train as one rank, or start all ranks of a pod."""

import argparse
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from dist_sae import logs, signals
from dist_sae.commands import shared

if TYPE_CHECKING:
    from dist_sae.config import Run

_LEAST_STEPS = 20


def add(commands: shared.Commands) -> None:
    """Add the command."""
    parser = shared.add_command(
        commands, "train", main, "train as the rank given by RANK and WORLD_SIZE"
    )
    shared.add_parent(parser)
    shared.add_ranks(parser)
    shared.add_wait(parser, "the plan")
    parser.add_argument(
        "--find-lr",
        type=int,
        nargs="?",
        const=300,
        metavar="STEPS",
        help="instead, try nine learning rates around the run's for this many steps each (default "
        "%(const)s), and print the results",
    )


def main(options: argparse.Namespace) -> int | None:
    """Train as one rank, or start a pod's ranks and wait for them."""
    run = shared.load_for_device(options)
    asked = run
    if options.find_lr is not None:
        run = _lr_sweep(options, run)
    from dist_sae.config import groups_of
    from dist_sae.distributed.local_ranks import rank_environments
    from dist_sae.distributed.mesh import join_mesh
    from dist_sae.distributed.rendezvous import rendezvous
    from dist_sae.distributed.watch import Watch
    from dist_sae.errors import JobsFailedError, Stopped
    from dist_sae.telemetry.exporter import Telemetry
    from dist_sae.training.completed import completed_results
    from dist_sae.training.loop import train
    from dist_sae.training.waiting import await_plan

    world = run.processes.trainers
    groups = groups_of(run)
    n = world // len(groups)
    if world > 1 and (result := completed_results(run)):
        _print(options, asked, run, result)
        return None
    stopping = signals.stop_event()
    if options.local_ranks:
        environments = rank_environments(options.local_ranks, world)
        program = ["train", *(["--find-lr", str(options.find_lr)] if options.find_lr else [])]
        if options.local_ranks > 1:
            return shared.run_local_ranks(options, run, program, environments, stopping)
        os.environ.update(environments[0])
    group = min(shared.rank() // n, len(groups) - 1)  # the rendezvous refuses extra ranks
    own = groups[group]
    logs.configure(rank=shared.rank() % n)
    timeouts = run.timeouts
    with (
        Telemetry(
            run.name,
            "train",
            shared.metrics_port(run, options),
            shared.rank(),
            jobs=[job.name for job in own],
        ) as telemetry,
        shared.stop_if_peer_failed(asked, stopping),
    ):
        telemetry.set("dist_sae_train_ranks", n)  # before the rendezvous, which may fail
        if options.wait:  # after metrics are served, so that probes see a waiting process
            await_plan(run, stopping)
        telemetry.life = shared.this_life(run, "trainer", stopping)
        telemetry.life.begin()  # a failed rendezvous also counts as a life without progress
        with (
            rendezvous(world, timeouts.missing_seconds, stopping, name=run.name) as ranks,
            Watch(
                ranks,
                stopping,
                lost_seconds=timeouts.lost_seconds,
                hung_seconds=timeouts.hung_seconds,
                group_ranks=n,
            ) as watch,
            _leases(own if shared.rank() % n == 0 else (), stopping),
            join_mesh(ranks.group(n), run.processes.latent_shards) as mesh,
        ):
            try:
                result = train(run, mesh, watch, stopping, telemetry, group)
            except JobsFailedError:
                if n < world:  # only this group failed; the others continue
                    watch.done(wait=True)
                    if stopping.is_set():
                        raise Stopped(
                            "stopped together with the other groups; start again to continue"
                        ) from None
                if options.find_lr is None:
                    raise
                result = {}  # a rate that diverges is a result
            if n < world:
                watch.done(wait=False)
    _print(options, asked, run, result)
    return None


def _lr_sweep(options: argparse.Namespace, run: "Run") -> "Run":
    from dist_sae.errors import ConfigError
    from dist_sae.training.find_lr import lr_sweep

    if run.sweep:
        raise ConfigError("--find-lr: is for one dictionary; name a job of the sweep with --job")
    if options.find_lr < _LEAST_STEPS:
        raise ConfigError(
            f"--find-lr: {options.find_lr} steps are too few; use at least {_LEAST_STEPS}"
        )
    return lr_sweep(run, options.find_lr)


def _print(
    options: argparse.Namespace, asked: "Run", run: "Run", result: Mapping[str, Any]
) -> None:
    """Print the result; for `--find-lr`, one line per learning rate."""
    if options.find_lr is None:
        shared.print_result(options, result)
        return
    if shared.rank():
        return
    from dist_sae.report.formatting import format_result
    from dist_sae.training.find_lr import lr_table

    found = lr_table(run, asked.lr)
    heads = ["train.lr", "loss", "L0", "dead", "FVU at 25 %", "50 %", "75 %", "100 % of the steps"]
    rows = []
    for rate in found["rates"]:
        own = " (own)" if rate["lr"] == float(f"{asked.lr:.3g}") else ""
        ends = [rate["loss"], rate["l0"], rate["dead_share"], *rate["curve"]]
        if rate["loss"] is None:
            ends[0] = "diverged"
        names = ["loss", "l0", "dead_share", *("fvu" for _ in rate["curve"])]
        cells = ["" if x is None else format_result(n, x) for n, x in zip(names, ends, strict=True)]
        rows.append([f"{rate['lr']:g}{own}", *cells])
    lines = [*shared.table([heads, *rows]), found["said"], f"curves: {found['compare']}"]
    shared.print_lines(options, found, lines)


@contextmanager
def _leases(jobs: "Sequence[Run]", stopping: threading.Event) -> Iterator[None]:
    """Hold the leases on runs in the first rank, so that no other process trains them."""
    from dist_sae.checkpoint.lease import TrainerLease
    from dist_sae.storage import open_store

    with ExitStack() as held:
        for job in jobs:
            runs = open_store(job.store.runs, job.store.s3, None, stopping)
            held.enter_context(TrainerLease(runs, job.name, stopping))
        yield
