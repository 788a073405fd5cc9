"""`dist-sae train`: train as one rank of the job, or as all ranks of a pod."""

import argparse
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from dist_sae import logs, signals
from dist_sae.commands import shared

if TYPE_CHECKING:
    from dist_sae.config import Run


def add(commands: shared.Commands) -> None:
    """Add the command."""
    parser = shared.add_command(
        commands, "train", main, "train, as the rank that RANK and WORLD_SIZE name"
    )
    shared.add_parent(parser)
    shared.add_ranks(parser)
    shared.add_wait(parser, "the plan")


def main(options: argparse.Namespace) -> int | None:
    """Train as one rank, or as the parent of a pod's ranks."""
    run = shared.load_for_device(options)
    from dist_sae.config import jobs_of
    from dist_sae.distributed.local_ranks import rank_environments
    from dist_sae.distributed.mesh import join_mesh
    from dist_sae.distributed.rendezvous import rendezvous
    from dist_sae.distributed.watch import Watch
    from dist_sae.telemetry.exporter import Telemetry
    from dist_sae.training.completed import completed_results
    from dist_sae.training.loop import train
    from dist_sae.training.waiting import await_plan

    world = run.processes.trainers
    jobs = jobs_of(run)
    if world > 1 and (result := completed_results(run)):
        shared.print_result(options, result)
        return None
    stopping = signals.stop_event()
    if options.local_ranks:
        environments = rank_environments(options.local_ranks, world)
        if options.local_ranks > 1:
            return shared.run_local_ranks(options, run, ["train"], environments, stopping)
        os.environ.update(environments[0])
        logs.configure(rank=shared.rank())
    timeouts = run.timeouts
    with Telemetry(
        run.name,
        "train",
        shared.metrics_port(run, options),
        shared.rank(),
        jobs=[job.name for job in jobs],
    ) as telemetry:
        telemetry.set("dist_sae_train_ranks", world)  # before the rendezvous: one may not come
        if options.wait:  # while metrics are served: a process that waits is alive
            await_plan(run, stopping)
        telemetry.life = shared.this_life(run, "trainer", stopping)
        telemetry.life.begin()  # ranks that do not come are a life without progress too
        with (
            rendezvous(world, timeouts.missing_seconds, stopping, name=run.name) as ranks,
            Watch(
                ranks,
                stopping,
                lost_seconds=timeouts.lost_seconds,
                hung_seconds=timeouts.hung_seconds,
            ) as watch,
            _leases(jobs, stopping),
            join_mesh(ranks, run.processes.latent_shards) as mesh,
        ):
            result = train(run, mesh, watch, stopping, telemetry)
    shared.print_result(options, result)
    return None


@contextmanager
def _leases(jobs: "Sequence[Run]", stopping: threading.Event) -> Iterator[None]:
    """The leases on the runs, which rank 0 holds: nobody else may train them meanwhile."""
    from dist_sae.checkpoint.lease import TrainerLease
    from dist_sae.storage import open_store

    with ExitStack() as held:
        for job in jobs if shared.rank() == 0 else ():
            runs = open_store(job.store.runs, job.store.s3, None, stopping)
            held.enter_context(TrainerLease(runs, job.name, stopping))
        yield
