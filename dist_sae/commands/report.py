"""`dist-sae report`: write one HTML file about a run."""

import argparse

from dist_sae.commands import shared


def add(commands: shared.Commands) -> None:
    """Add the command."""
    text = "write one HTML file with a run's curves, numbers and latents"
    shared.add_step(shared.add_command(commands, "report", main, text))


def main(options: argparse.Namespace) -> None:
    """Make the report, and say where it is."""
    run = shared.load(options)
    from dist_sae.report.build import report

    with shared.short_lived(run, "report") as telemetry:
        result = report(run, telemetry, options.step)
    shared.print_result(options, {"report": result})
