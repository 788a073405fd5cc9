"""`dist-sae export`: write a checkpoint as SAELens loads it."""

import argparse

from dist_sae.commands import shared


def add(commands: shared.Commands) -> None:
    """Add the command."""
    text = "write a checkpoint as safetensors that SAELens loads"
    shared.add_step(shared.add_command(commands, "export", main, text))


def main(options: argparse.Namespace) -> None:
    """Export, and say where."""
    run = shared.load(options)
    from dist_sae.interop.export import export

    with shared.short_lived(run, "export") as telemetry:
        result = export(run, telemetry, options.step)
    shared.print_result(options, {"export": result})
