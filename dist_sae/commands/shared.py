"""Shared by commands: options, the run file, results."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_sae.config import Run

Commands = Any
"""Where a command is added: what `add_subparsers` returns."""
Main = Callable[[argparse.Namespace], int | None]


def add_command(commands: Commands, name: str, main: Main, text: str) -> argparse.ArgumentParser:
    """Add a command on a run; returns its parser, for options of its own."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("run", metavar="RUN", help="a run file, or a run's folder: a path or URL")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override a setting: sae.k=64",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.set_defaults(command=main)
    return parser


def add_group(commands: Commands, name: str, text: str, metavar: str = "ACTION") -> Commands:
    """Add a command that consists of actions; returns where they are added."""
    parser = commands.add_parser(name, help=text, description=text)
    return parser.add_subparsers(metavar=metavar, required=True)


def add_step(parser: argparse.ArgumentParser) -> None:
    """Add `--step`."""
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")


def load(options: argparse.Namespace) -> "Run":
    """Read the run that the command line names."""
    from dist_sae.checkpoint.folder import open_run

    return open_run(options.run, options.set)


def rank() -> int:
    """Rank of this process in its job, from the variable that torchrun sets."""
    return int(os.environ.get("RANK", "0"))


def print_json(options: argparse.Namespace, content: Any) -> None:
    """Print JSON: on one line for programs, indented for people."""
    sys.stdout.write(json.dumps(content, indent=None if options.json else 2) + "\n")


def print_lines(options: argparse.Namespace, content: Any, lines: Sequence[str]) -> None:
    """Print lines, or the content as JSON if a program asked."""
    if options.json:
        print_json(options, content)
    else:
        sys.stdout.writelines(f"{line}\n" for line in lines)


def print_result(options: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Print names and values; with --json one object, as the last line of stdout."""
    if options.json:
        print_json(options, result)
        return
    from dist_sae.report.shown import shown

    for name, value in result.items():
        if name == "made_from":  # for programs
            continue
        if isinstance(value, Mapping):
            sys.stdout.write(f"{name}\n" if value else "")
            for key, item in value.items():
                unit = name if name.endswith("bytes") else key
                ends = item if isinstance(item, list) else [item]  # a list of two is an interval
                text = " to ".join(shown(unit, end) for end in ends)
                sys.stdout.write(f"  {key:40} {text}\n")
        elif not isinstance(value, list):
            sys.stdout.write(f"{name:20} {shown(name, value)}\n")
