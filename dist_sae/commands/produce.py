"""`dist-sae produce`: run the language model over units and store their activations."""

import argparse
import os

from dist_sae import signals
from dist_sae.commands import shared


def add(commands: shared.Commands) -> None:
    """Add the command."""
    text = "run the model over units and store their activations"
    parser = shared.add_command(commands, "produce", main, text)
    parser.add_argument("--worker", help="name of this producer, unique among running producers")
    parser.add_argument(
        "--index",
        type=int,
        default=int(os.environ.get("JOB_COMPLETION_INDEX", "0")),
        help="number of this producer, below processes.producers; needed if the store has no "
        "conditional writes (default: JOB_COMPLETION_INDEX, else 0)",
    )
    shared.add_ranks(parser)
    shared.add_wait(parser, "the plan")


def main(options: argparse.Namespace) -> int | None:
    """Produce as one process, or start a pod's ranks and wait for them."""
    run = shared.load_for_device(options)
    from dist_sae.data.work_queue import Worker
    from dist_sae.distributed.local_ranks import rank_environments
    from dist_sae.producing.loop import produce
    from dist_sae.producing.together import produce_together
    from dist_sae.telemetry.exporter import Telemetry
    from dist_sae.training.waiting import await_plan

    stopping = signals.stop_event()
    first_rank = options.index * run.tensor_parallel
    if options.local_ranks > 1:
        name = ["--worker", options.worker] if options.worker else []
        arguments = ["produce", "--index", str(options.index), *name]
        environments = rank_environments(options.local_ranks, run.tensor_parallel)
        return shared.run_local_ranks(options, run, arguments, environments, stopping, first_rank)
    worker = Worker(
        options.worker or f"producer-{os.getpid()}@{os.uname().nodename}",
        options.index,
        run.processes.producers,
    )
    port = shared.metrics_port(run, options)
    with (
        Telemetry(run.name, "produce", port, first_rank + shared.rank()) as telemetry,
        shared.stop_if_peer_failed(run, stopping),
    ):
        if options.wait:  # after metrics are served, so that probes see a waiting process
            await_plan(run, stopping)
        telemetry.life = shared.this_life(run, "producer", stopping)
        work = produce_together if run.tensor_parallel > 1 else produce
        result = work(run, worker, stopping, telemetry)
    shared.print_result(options, result)
    return None
