"""`dist-sae evaluate`: measure a checkpoint on held-out data."""

import argparse

from dist_sae import signals
from dist_sae.commands import shared


def add(commands: shared.Commands) -> None:
    """Add the command."""
    parser = shared.add_command(commands, "evaluate", main, "measure a checkpoint on held-out data")
    shared.add_step(parser)
    shared.add_wait(parser, "the last checkpoint")


def main(options: argparse.Namespace) -> None:
    """Evaluate, and print the numbers."""
    run = shared.load(options)
    from dist_sae.evaluation.evaluate import evaluate

    if options.wait:
        from dist_sae.training.waiting import await_end

        await_end(run, signals.stop_event())
        signals.heed()
    with shared.short_lived(run, "evaluate") as telemetry:
        result = evaluate(run, telemetry, options.step)
    shared.print_result(options, result)
