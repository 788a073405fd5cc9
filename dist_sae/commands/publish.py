"""`dist-sae publish`: upload a checkpoint with a model card to the hub."""

import argparse
from pathlib import Path
from typing import Any

from dist_sae.commands import shared
from dist_sae.errors import ConfigError
from dist_sae.interop import FORMATS


def add(commands: shared.Commands) -> None:
    """Add the command."""
    text = "upload a checkpoint with a model card to the hub; sends nothing without --yes"
    parser = shared.add_command(commands, "publish", main, text)
    parser.add_argument("repository", metavar="ORG/NAME", help="model repository on the hub")
    shared.add_step(parser)
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default=FORMATS[0],
        help=f"format, as in export: {', '.join(FORMATS)}",
    )
    for option, what in (
        ("--licence", "the dictionary, by the hub's name, such as apache-2.0"),
        ("--model-licence", "the model"),
        ("--text-licence", "the text"),
    ):
        parser.add_argument(option, metavar="NAME", help=f"license of {what} (default: not stated)")
    parser.add_argument(
        "--dry-run",
        type=Path,
        metavar="FOLDER",
        help="write the files to this folder, and send nothing",
    )
    parser.add_argument("--yes", action="store_true", help="send the files")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    parser.add_argument(
        "--replace", action="store_true", help="upload even if the repository already has files"
    )


def main(options: argparse.Namespace) -> None:
    """Upload the files or write them to a folder, and print what and where."""
    if bool(options.dry_run) == options.yes:
        raise ConfigError(
            "nothing was sent; inspect the files with --dry-run FOLDER, then send them with --yes"
        )
    run = shared.load(options)
    from dist_sae.interop import publishing

    licences = publishing.Licences(options.licence, options.model_licence, options.text_licence)
    with shared.pushed_telemetry(run, "export") as telemetry:
        export = {"meter": telemetry, "step": options.step, "format_name": options.format}
        if options.dry_run:
            written = publishing.write(run, options.repository, options.dry_run, licences, **export)
            sizes = {
                str(path.relative_to(options.dry_run)): path.stat().st_size for path in written
            }
            result: dict[str, Any] = {"folder": str(options.dry_run), "bytes": sizes}
        else:
            url = publishing.send(
                run,
                options.repository,
                licences,
                public=options.public,
                replace=options.replace,
                **export,
            )
            result = {"commit": url}
    shared.print_result(options, result)
