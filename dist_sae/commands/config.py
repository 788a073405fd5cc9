"""`dist-sae config`: the resolved run file, its schema, and the exported metrics."""

import argparse
import sys

from dist_sae.commands import shared


def add(commands: shared.Commands) -> None:
    """Add the command."""
    actions = shared.add_group(
        commands, "config", "print the resolved run file, its schema, or the exported metrics"
    )
    shared.add_command(actions, "show", _show, "print the resolved run")
    schema = actions.add_parser("schema", help="print the JSON Schema of run files, for editors")
    schema.add_argument("--json", action="store_true", help="print it on one line")
    schema.set_defaults(command=_schema)
    metrics = actions.add_parser("metrics", help="print the metrics that programs export")
    metrics.set_defaults(command=_metrics)


def _show(options: argparse.Namespace) -> None:
    run = shared.load_run_or_sweep(options)
    import yaml

    from dist_sae.config import dump_run

    if options.json:
        shared.print_json(options, yaml.safe_load(dump_run(run)))
    else:
        sys.stdout.write(dump_run(run))


def _schema(options: argparse.Namespace) -> None:
    from dist_sae.config import Run

    shared.print_json(options, Run.model_json_schema())


def _metrics(_: argparse.Namespace) -> None:
    from dist_sae.telemetry.metrics import render_table

    sys.stdout.write(render_table())
