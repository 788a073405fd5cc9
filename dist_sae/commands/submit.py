"""`dist-sae submit`: start a run on a Kubernetes cluster."""

import argparse

from dist_sae.commands import shared


def add(commands: shared.Commands) -> None:
    """Add the command."""
    parser = shared.add_command(commands, "submit", main, "start a run on a Kubernetes cluster")
    parser.add_argument("--dry-run", action="store_true", help="only show what would change")
    parser.add_argument(
        "--replace",
        action="store_true",
        help="if it runs with other settings, let its pods save and exit, then start new ones",
    )
    shared.add_ignore_nodes(parser)


def main(options: argparse.Namespace) -> None:
    """Submit the run, and print each change to the cluster."""
    run, cluster = shared.open_cluster(options)
    from dist_sae.kubernetes.submit import submit

    result = submit(
        run,
        cluster,
        shared.line_writer(options),
        dry_run=options.dry_run,
        replace=options.replace,
        ignore_nodes=options.ignore_nodes,
    )
    shared.print_lines(options, result, [])
