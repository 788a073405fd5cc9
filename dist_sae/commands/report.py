"""`dist-sae report`: write one HTML file about a run."""

import argparse
from typing import TYPE_CHECKING

from dist_sae.commands import shared

if TYPE_CHECKING:
    from dist_sae.config import Run


def add(commands: shared.Commands) -> None:
    """Add the command."""
    text = "write one HTML file with a run's curves, numbers and latents"
    shared.add_step(shared.add_command(commands, "report", main, text))


def main(options: argparse.Namespace) -> None:
    """Write the report, and print where it is."""
    whole = shared.load_run_or_sweep(options)
    from dist_sae.report.build import report

    def work(run: "Run") -> dict[str, str]:
        with shared.pushed_telemetry(run, "report") as telemetry:
            return {"report": report(run, telemetry, options.step)}

    shared.print_results(options, whole, work)
