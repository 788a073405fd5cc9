"""`dist-sae checkpoints`: list, verify or convert a run's checkpoints."""

import argparse
from pathlib import Path

from dist_sae.commands import shared


def add(commands: shared.Commands) -> None:
    """Add the command."""
    actions = shared.add_group(
        commands, "checkpoints", "list, verify or convert a run's checkpoints"
    )
    shared.add_command(actions, "ls", _ls, "list the checkpoints")
    shared.add_command(
        actions, "verify", _verify, "check every part of every checkpoint against its manifest"
    )
    text = "write a checkpoint to a file, or let another run start from it"
    convert = shared.add_command(actions, "convert", _convert, text)
    target = convert.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", type=Path, help="safetensors file to write")
    target.add_argument(
        "--to-run",
        metavar="NEW.yaml",
        help="run that will start from it; `train` adds missing latents",
    )
    shared.add_step(convert)
    convert.add_argument(
        "--moments", action="store_true", help="also write the optimizer's moments"
    )


def _ls(options: argparse.Namespace) -> None:
    run = shared.load(options)
    from dist_sae.checkpoint.maintenance import ls

    found = ls(run)
    lines = [
        f"step {c['step']:<10} {c['rows']:>14,} rows trained   "
        f"{c['bytes'] / 1e6:,.1f} MB in {c['parts']} parts"
        for c in found["checkpoints"]
    ]
    lines += [
        f"step {step:<10} damaged: its manifest does not match its checksum"
        for step in found["damaged"]
    ]
    shared.print_lines(options, found, lines)


def _verify(options: argparse.Namespace) -> None:
    run = shared.load(options)
    from dist_sae.checkpoint.maintenance import verify

    found = verify(run)
    shared.print_result(options, found)
    shared.raise_if_bad(
        f"{run.store.runs}/{run.name}/checkpoints",
        "damaged checkpoints; training continues from the newest intact one, and the damaged ones "
        "may be deleted",
        found["bad_objects"].values(),
    )


def _convert(options: argparse.Namespace) -> None:
    run = shared.load(options)
    from dist_sae.checkpoint.maintenance import convert, convert_to_run
    from dist_sae.checkpoint.run_folder import open_run
    from dist_sae.errors import ConfigError

    if options.to_run and options.moments:
        raise ConfigError("--moments: needs --output; a new run starts with new moments")
    if options.to_run:
        result = convert_to_run(run, open_run(options.to_run, []), step=options.step)
    else:
        result = convert(run, options.output, step=options.step, moments=options.moments)
    shared.print_result(options, result)
