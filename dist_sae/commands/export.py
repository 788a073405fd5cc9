"""`dist-sae export`: write a checkpoint as SAELens loads it."""

import argparse
import logging
from typing import TYPE_CHECKING

from dist_sae.commands import shared

if TYPE_CHECKING:
    from dist_sae.config import Run

logger = logging.getLogger(__name__)


def add(commands: shared.Commands) -> None:
    """Add the command."""
    text = "write a checkpoint as safetensors that SAELens loads"
    shared.add_step(shared.add_command(commands, "export", main, text))


def main(options: argparse.Namespace) -> None:
    """Export, and say where."""
    whole = shared.load_whole(options)
    from dist_sae.interop import sae_lens
    from dist_sae.interop.export import export

    def work(run: "Run") -> dict[str, str] | None:
        if whole.sweep and (problem := sae_lens.problem(run)):
            logger.warning("%s is not exported: %s", run.name, problem)
            return None
        with shared.short_lived(run, "export") as telemetry:
            return {"export": export(run, telemetry, options.step)}

    shared.print_results(options, whole, work)
