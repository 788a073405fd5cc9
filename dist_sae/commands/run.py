"""`dist-sae run`: do all parts of a run on this machine."""

import argparse

from dist_sae import signals
from dist_sae.commands import shared


def add(commands: shared.Commands) -> None:
    """Add the command."""
    text = "do a whole run on this machine: plan, produce, train, index, evaluate, export, report"
    shared.add_parent(shared.add_command(commands, "run", main, text))


def main(options: argparse.Namespace) -> None:
    """Run all programs, and print the evaluation's numbers."""
    run = shared.load_for_device(options)
    from dist_sae.commands.pipeline import run_locally

    stopping = signals.stop_event()
    job = ["--job", options.job] if options.job else []
    overrides = [word for override in options.set for word in ("--set", override)]
    results = run_locally(run, [options.run, *overrides, *job], stopping)
    shared.print_results(options, run, lambda each: results.get(each.name))
