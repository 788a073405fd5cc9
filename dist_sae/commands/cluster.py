"""`dist-sae submit|status|logs|cancel|resume`: their options, and what each of them calls.

As on the rest of the command line, programs are imported when they are called, after the run file
is read.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_sae.config import Run
    from dist_sae.kubernetes.cluster import Cluster

Command = Callable[[argparse.Namespace], int | None]
_REFRESH_SECONDS = 3.0


def add_cluster_commands(add: Callable[[str, Command, str], argparse.ArgumentParser]) -> None:
    """Add the commands; `add` makes one that has a run file."""
    submit = add("submit", _submit, "bring the run to a Kubernetes cluster")
    submit.add_argument("--dry-run", action="store_true", help="only show what would change")
    submit.add_argument(
        "--replace",
        action="store_true",
        help="where it runs with other settings: let its pods save and end, then begin new ones",
    )
    resume = add("resume", _resume, "let a run go on that was cancelled, failed or is gone")
    for sub in (submit, resume):
        sub.add_argument(
            "--ignore-nodes",
            action="store_true",
            help="even if its pods are too large for every node there is now",
        )
    status = add("status", _status, "show pods, store and metrics of a run in one view")
    status.add_argument("--watch", action="store_true", help="until Ctrl-C")
    logs = add("logs", _logs, "print what a run's pods say")
    logs.add_argument(
        "which",
        nargs="?",
        metavar="PODS",
        default="trainer-0",
        help="planner, producer, trainer or reporter; one of them, as trainer-0 (the default); or "
        "a pod's name",
    )
    logs.add_argument("--follow", "-f", action="store_true", help="until they end")
    logs.add_argument("--previous", action="store_true", help="of the pods before the present ones")
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
    _finish(options, result)


def _resume(options: argparse.Namespace) -> None:
    run, cluster = _open(options)
    from dist_sae.kubernetes.submit import resume

    _finish(options, resume(run, cluster, _say(options), ignore_nodes=options.ignore_nodes))


def _cancel(options: argparse.Namespace) -> None:
    run, cluster = _open(options)
    from dist_sae.kubernetes.submit import cancel

    _finish(options, cancel(run, cluster, _say(options)))


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


def _status(options: argparse.Namespace) -> None:
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
        _finish(options, read())
        return
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    if not options.watch:
        console.print(render_status(read()))
        return
    logging.disable(logging.WARNING)  # what is out of reach is in the view
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(render_status(read()), refresh=True)
                time.sleep(_REFRESH_SECONDS)
    except KeyboardInterrupt:  # how one ends it
        return
    finally:
        logging.disable(logging.NOTSET)


def _open(options: argparse.Namespace) -> tuple["Run", "Cluster"]:
    from dist_sae.checkpoint.folder import open_run

    run = open_run(options.run, options.set)
    from dist_sae.kubernetes.cluster import Cluster

    return run, Cluster(run.cluster)


def _say(options: argparse.Namespace) -> Callable[[str], None]:
    """Words for people; where a program asked, they do not go where its object goes."""
    stream = sys.stderr if options.json else sys.stdout

    def say(line: str) -> None:
        stream.write(line + "\n")
        stream.flush()

    return say


def _finish(options: argparse.Namespace, result: Mapping[str, Any]) -> None:
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")
