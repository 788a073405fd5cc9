"""`dist-sae plan`: read the corpus and assign its documents to units."""

import argparse
import threading

from dist_sae.commands import shared
from dist_sae.errors import EXIT_RESUMABLE, DistSaeError


def add(commands: shared.Commands) -> None:
    """Add the command."""
    text = "read the corpus and assign its documents to units"
    shared.add_command(commands, "plan", main, text)


def main(options: argparse.Namespace) -> None:
    """Write the plan, and print its numbers."""
    run = shared.load_run_or_sweep(options)
    from dist_sae.producing.planner import plan_and_forecast

    ending = threading.Event()
    life = shared.this_life(run, "planner", ending)
    life.begin()
    try:
        with shared.pushed_telemetry(run, "plan") as telemetry:
            _, numbers = plan_and_forecast(run, telemetry)
    except (DistSaeError, KeyboardInterrupt) as exc:
        if getattr(exc, "exit_code", EXIT_RESUMABLE) == EXIT_RESUMABLE:
            ending.set()
            life.progressed()  # a preemption or an unavailable hub is not a crash
        raise
    shared.print_result(options, numbers)
