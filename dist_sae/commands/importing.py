"""`dist-sae import`: create a run from another library's dictionary."""

import argparse
from pathlib import Path

from dist_sae.commands import shared


def add(commands: shared.Commands) -> None:
    """Add the command."""
    text = (
        "create a run from a dictionary of SAELens, sparsify, dictionary_learning, circuit-tracer "
        "or Gemma Scope"
    )
    parser = commands.add_parser("import", help=text, description=text)
    parser.add_argument(
        "source",
        metavar="SOURCE",
        type=Path,
        help="folder with the dictionary's files, or one layer's file",
    )
    parser.add_argument(
        "--as",
        metavar="RUN",
        dest="run",
        required=True,
        help="run file with the name, the stores, the model, the text and the site (for "
        "transcoders: sae.reads and sae.writes); the rest of sae is replaced",
    )
    shared.add_settings(parser)
    parser.set_defaults(command=main)


def main(options: argparse.Namespace) -> None:
    """Import the dictionary, and print what was found."""
    run = shared.load(options)
    from dist_sae.interop.importing import import_dictionary

    shared.print_result(options, import_dictionary(options.source, run))
