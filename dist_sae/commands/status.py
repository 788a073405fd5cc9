"""`dist-sae status`: one view of a run's pods, store and metrics."""

import argparse
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from dist_sae.commands import shared

_REFRESH_SECONDS = 3.0


def add(commands: shared.Commands) -> None:
    """Add the command."""
    text = "show a run's pods, store and metrics in one view"
    parser = shared.add_command(commands, "status", main, text)
    parser.add_argument("--watch", action="store_true", help="refresh the view until Ctrl-C")


def main(options: argparse.Namespace) -> None:
    """Show the view once, or refresh it until Ctrl-C."""
    run, cluster = shared.open_cluster(options)
    from rich.console import Console
    from rich.live import Live

    from dist_sae.kubernetes.status import read_status
    from dist_sae.kubernetes.stored import StoredRun
    from dist_sae.kubernetes.view import render_status

    stored = StoredRun(run)

    def read() -> Mapping[str, Any]:
        return read_status(run, cluster, stored)

    if options.json:
        shared.print_json(options, read())
        return
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    if not options.watch:
        console.print(render_status(read()))
        return
    logging.disable(logging.WARNING)  # the view shows what cannot be reached
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(render_status(read()), refresh=True)
                time.sleep(_REFRESH_SECONDS)
    except KeyboardInterrupt:  # the way to end it
        return
    finally:
        logging.disable(logging.NOTSET)
