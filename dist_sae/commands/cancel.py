"""`dist-sae cancel`: delete a run's objects from the cluster."""

import argparse

from dist_sae.commands import shared


def add(commands: shared.Commands) -> None:
    """Add the command."""
    text = "remove a run from the cluster; the store keeps everything"
    shared.add_command(commands, "cancel", main, text)


def main(options: argparse.Namespace) -> None:
    """Cancel the run. Its pods save before they end."""
    run, cluster = shared.open_cluster(options)
    from dist_sae.kubernetes.submit import cancel

    shared.print_lines(options, cancel(run, cluster, shared.line_writer(options)), [])
