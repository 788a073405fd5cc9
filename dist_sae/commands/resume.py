"""`dist-sae resume`: continue a run on the cluster."""

import argparse

from dist_sae.commands import shared


def add(commands: shared.Commands) -> None:
    """Add the command."""
    text = "continue a run that was canceled, has failed or was deleted"
    shared.add_ignore_nodes(shared.add_command(commands, "resume", main, text))


def main(options: argparse.Namespace) -> None:
    """Resume the run, and print each change to the cluster."""
    run, cluster = shared.open_cluster(options)
    from dist_sae.kubernetes.submit import resume

    result = resume(run, cluster, shared.line_writer(options), ignore_nodes=options.ignore_nodes)
    shared.print_lines(options, result, [])
