"""`dist-sae render`: a run's DeepSpeed configuration, Kubernetes objects and dashboards."""

import argparse
import sys

from dist_sae.commands import shared


def add(commands: shared.Commands) -> None:
    """Add the command."""
    text = "print the DeepSpeed configuration and the Kubernetes objects of a run"
    shared.add_command(commands, "render", main, text).add_argument(
        "--only",
        choices=("deepspeed", "kubernetes", "dashboards"),
        help="print only this part; kubernetes: as input for kubectl apply -f -; dashboards: for "
        "Grafana",
    )


def main(options: argparse.Namespace) -> None:
    """Print them as JSON, or as YAML for kubectl."""
    run = shared.load_run_or_sweep(options)
    from dist_sae.kubernetes.render import render, to_yaml

    found = render(run, options.only)
    if options.only == "kubernetes" and not options.json:
        sys.stdout.write(to_yaml(found["kubernetes"]))
    else:
        shared.print_json(options, found)
