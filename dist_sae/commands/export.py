"""`dist-sae export`: write a checkpoint in another library's format."""

import argparse
import logging
from typing import TYPE_CHECKING

from dist_sae.commands import shared
from dist_sae.interop import FORMATS, INDEX_FORMATS

if TYPE_CHECKING:
    from dist_sae.config import Run

logger = logging.getLogger(__name__)


def add(commands: shared.Commands) -> None:
    """Add the command."""
    text = "write a checkpoint in another library's format, by default that of SAELens"
    parser = shared.add_command(commands, "export", main, text)
    shared.add_step(parser)
    parser.add_argument(
        "--format",
        choices=(*FORMATS, *INDEX_FORMATS),
        default=FORMATS[0],
        help=f"library that reads it: {', '.join(FORMATS)} (default: {FORMATS[0]}); or "
        + ", or ".join(f"{name}, which gets {what}" for name, what in INDEX_FORMATS.items()),
    )


def main(options: argparse.Namespace) -> None:
    """Export the checkpoint, and print where."""
    whole = shared.load_run_or_sweep(options)
    if options.format in INDEX_FORMATS:
        from dist_sae.interop import delphi, neuronpedia

        write = {"delphi": delphi.export_cache, "neuronpedia": neuronpedia.export_pages}

        def of_index(run: "Run") -> dict[str, str]:
            with shared.pushed_telemetry(run, "export") as telemetry:
                return {"export": write[options.format](run, telemetry, options.step)}

        shared.print_results(options, whole, of_index)
        return
    from dist_sae.interop.export import export, problem

    def work(run: "Run") -> dict[str, str] | None:
        if whole.sweep and (reason := problem(run, options.format)):
            logger.warning("%s is not exported: %s", run.name, reason)
            return None
        with shared.pushed_telemetry(run, "export") as telemetry:
            return {"export": export(run, telemetry, options.step, options.format)}

    shared.print_results(options, whole, work)
