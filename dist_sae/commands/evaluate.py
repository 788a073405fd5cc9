"""`dist-sae evaluate`: measure a checkpoint on held-out data."""

import argparse
import os
from typing import TYPE_CHECKING, Any

from dist_sae import signals
from dist_sae.commands import shared

if TYPE_CHECKING:
    from dist_sae.config import Run


def add(commands: shared.Commands) -> None:
    """Add the command."""
    parser = shared.add_command(commands, "evaluate", main, "measure a checkpoint on held-out data")
    shared.add_step(parser)
    shared.add_ranks(parser)
    shared.add_wait(parser, "the last checkpoint and its index, if the run builds one")


def main(options: argparse.Namespace) -> int | None:
    """Evaluate as a single process, as one rank (RANK of WORLD_SIZE), or as the ranks' parent."""
    whole = shared.load_for_device(options)
    if options.local_ranks > 1:
        from dist_sae.distributed.local_ranks import rank_environments

        step = ["--step", str(options.step)] if options.step is not None else []
        as_json = ["--json"] if options.json else []
        environments = rank_environments(options.local_ranks, options.local_ranks)
        arguments = ["evaluate", *step, *as_json]
        stopping = signals.stop_event()
        return shared.run_local_ranks(options, whole, arguments, environments, stopping)
    from dist_sae.distributed.mesh import single_process
    from dist_sae.evaluation.distributed import evaluate_on_ranks
    from dist_sae.evaluation.evaluate import evaluate

    world = int(os.environ.get("WORLD_SIZE", "1"))

    def work(run: "Run") -> dict[str, Any] | None:
        if options.wait:
            from dist_sae.index.progress import await_index
            from dist_sae.training.waiting import await_end

            stopping = signals.stop_event()
            with shared.stop_if_peer_failed(whole, stopping):
                await_end(run, stopping)
                if run.index.workers:
                    await_index(run, stopping)
            signals.install_handlers()
        with shared.pushed_telemetry(run, "evaluate") as telemetry:
            if world == 1:
                return evaluate(run, telemetry, options.step, single_process())
            result = evaluate_on_ranks(run, world, telemetry, options.step)
        return result if shared.rank() == 0 else None

    shared.print_results(options, whole, work)
    return None
