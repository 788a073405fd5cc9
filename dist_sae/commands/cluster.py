"""A run on a Kubernetes cluster: `submit`, `resume`, `status`, `logs`, `cancel`."""

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from dist_sae.commands import shared

if TYPE_CHECKING:
    from dist_sae.config import Run
    from dist_sae.kubernetes.cluster import Cluster

_REFRESH_SECONDS = 3.0


def add(commands: shared.Commands) -> None:
    """Add the commands."""
    add = partial(shared.add_command, commands)
    submit = add("submit", _submit, "bring the run to a Kubernetes cluster")
    submit.add_argument("--dry-run", action="store_true", help="only show what would change")
    submit.add_argument(
        "--replace",
        action="store_true",
        help="if it runs with other settings: let its pods save and end, then start new ones",
    )
    resume = add("resume", _resume, "continue a run that was cancelled, failed or is gone")
    for parser in (submit, resume):
        parser.add_argument(
            "--ignore-nodes",
            action="store_true",
            help="even if its pods are too large for every present node",
        )
    status = add("status", _status, "show pods, store and metrics of a run in one view")
    status.add_argument("--watch", action="store_true", help="until Ctrl-C")
    logs = add("logs", _logs, "print the logs of a run's pods")
    logs.add_argument(
        "which",
        nargs="?",
        metavar="PODS",
        default="trainer-0",
        help="planner, producer, trainer or reporter; one of them, as trainer-0 (the default); or "
        "a pod's name",
    )
    logs.add_argument("--follow", "-f", action="store_true", help="until they end")
    logs.add_argument("--previous", action="store_true", help="logs of the pods before these")
    logs.add_argument("--tail", type=int, metavar="N", help="only the last N lines of each pod")
    add("cancel", _cancel, "take a run off the cluster; the store keeps everything")


def _submit(options: argparse.Namespace) -> None:
    run, cluster = _open(options)
    from dist_sae.kubernetes.submit import submit

    result = submit(
        run,
        cluster,
        _say(options),
        dry_run=options.dry_run,
        replace=options.replace,
        ignore_nodes=options.ignore_nodes,
    )
    shared.print_lines(options, result, [])


def _resume(options: argparse.Namespace) -> None:
    run, cluster = _open(options)
    from dist_sae.kubernetes.submit import resume

    result = resume(run, cluster, _say(options), ignore_nodes=options.ignore_nodes)
    shared.print_lines(options, result, [])


def _cancel(options: argparse.Namespace) -> None:
    run, cluster = _open(options)
    from dist_sae.kubernetes.submit import cancel

    shared.print_lines(options, cancel(run, cluster, _say(options)), [])


def _status(options: argparse.Namespace) -> None:
    """Show the view once, or refresh it until Ctrl-C."""
    run, cluster = _open(options)
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
    logging.disable(logging.WARNING)  # the view says what is out of reach
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(render_status(read()), refresh=True)
                time.sleep(_REFRESH_SECONDS)
    except KeyboardInterrupt:  # the way to end it
        return
    finally:
        logging.disable(logging.NOTSET)


def _logs(options: argparse.Namespace) -> None:
    run, cluster = _open(options)
    from dist_sae.kubernetes.logs import read_logs

    for line in read_logs(
        run,
        cluster,
        options.which,
        follow=options.follow,
        previous=options.previous,
        tail=options.tail,
    ):
        text = json.dumps({"line": line}) if options.json else line
        sys.stdout.write(text + "\n")
        if options.follow:
            sys.stdout.flush()


def _open(options: argparse.Namespace) -> tuple["Run", "Cluster"]:
    """Read the run, and open its namespace on the cluster."""
    run = shared.load(options)
    from dist_sae.kubernetes.cluster import Cluster

    return run, Cluster(run.cluster)


def _say(options: argparse.Namespace) -> Callable[[str], None]:
    """A function that prints lines for people: to stderr where stdout is for a program."""
    return partial(print, file=sys.stderr if options.json else sys.stdout, flush=True)
