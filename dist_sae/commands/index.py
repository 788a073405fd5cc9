"""`dist-sae index`: build the latent index of a trained dictionary."""

import argparse
import os
from typing import TYPE_CHECKING, Any

from dist_sae import signals
from dist_sae.commands import shared

if TYPE_CHECKING:
    from dist_sae.config import Run


def add(commands: shared.Commands) -> None:
    """Add the command."""
    text = "build an index of what each latent of a trained dictionary does on all rows"
    parser = shared.add_command(commands, "index", main, text)
    shared.add_step(parser)
    parser.add_argument("--worker", help="name of this worker, unique among running workers")
    parser.add_argument(
        "--index",
        type=int,
        default=int(os.environ.get("JOB_COMPLETION_INDEX", "0")),
        help="number of this worker, below index.workers; needed if the store has no "
        "conditional writes (default: JOB_COMPLETION_INDEX, else 0)",
    )
    parser.add_argument(
        "--repair",
        action="store_true",
        help="check every object of the index, and rebuild damaged ones",
    )
    shared.add_ranks(parser)
    shared.add_wait(parser, "the last checkpoint")


def main(options: argparse.Namespace) -> int | None:
    """Build the index as one process, or start a worker's ranks and wait for them."""
    run = whole = shared.load_for_device(options)
    from dist_sae.data.work_queue import Worker
    from dist_sae.distributed.local_ranks import rank_environments
    from dist_sae.index.build import index
    from dist_sae.telemetry.exporter import Telemetry
    from dist_sae.training.waiting import await_end

    stopping = signals.stop_event()
    shards = run.index.latent_shards
    first_rank = options.index * shards
    if options.local_ranks > 1:
        name = ["--worker", options.worker] if options.worker else []
        step = ["--step", str(options.step)] if options.step is not None else []
        arguments = ["index", "--index", str(options.index), *name, *step]
        arguments += ["--repair"] if options.repair else []
        environments = rank_environments(options.local_ranks, shards)
        return shared.run_local_ranks(options, run, arguments, environments, stopping, first_rank)
    worker = Worker(
        options.worker or f"index-{os.getpid()}@{os.uname().nodename}",
        options.index,
        max(1, run.index.workers),
    )
    port = shared.metrics_port(run, options)

    def work(run: "Run") -> dict[str, Any]:
        with (
            Telemetry(run.name, "index", port, first_rank + shared.rank()) as telemetry,
            shared.stop_if_peer_failed(whole, stopping),
        ):
            if options.wait:  # after metrics are served, so that probes see a waiting process
                await_end(run, stopping)
            telemetry.life = shared.this_life(run, "index", stopping)
            return index(run, worker, stopping, telemetry, options.step, repair=options.repair)

    shared.print_results(options, whole, work)
    return None
