"""`dist-sae logs`: print the logs of a run's pods."""

import argparse
import json
import sys

from dist_sae.commands import shared


def add(commands: shared.Commands) -> None:
    """Add the command."""
    parser = shared.add_command(commands, "logs", main, "print the logs of a run's pods")
    parser.add_argument(
        "which",
        nargs="?",
        metavar="PODS",
        default="trainer-0",
        help="all pods of a part (planner, producer, trainer, index or reporter), one of them, "
        "such as trainer-0 (the default), or a pod's name",
    )
    parser.add_argument(
        "--follow", "-f", action="store_true", help="follow the logs until the pods end"
    )
    parser.add_argument(
        "--previous", action="store_true", help="print the logs of the pods that these replaced"
    )
    parser.add_argument(
        "--tail", type=int, metavar="N", help="print only the last N lines of each pod"
    )


def main(options: argparse.Namespace) -> None:
    """Print the lines as they arrive."""
    run, cluster = shared.open_cluster(options)
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
