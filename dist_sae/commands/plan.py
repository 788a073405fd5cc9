"""`dist-sae plan`: fix which documents make up which unit."""

import argparse

from dist_sae.commands import shared


def add(commands: shared.Commands) -> None:
    """Add the command."""
    text = "read the corpus and fix which documents make up which unit"
    shared.add_command(commands, "plan", main, text)


def main(options: argparse.Namespace) -> None:
    """Plan, and say what the plan gives."""
    run = shared.load_whole(options)
    from dist_sae.producing.planner import foresee

    with shared.short_lived(run, "plan") as telemetry:
        _, told = foresee(run, telemetry)
    shared.print_result(options, told)
