"""`dist-sae latents`: look up latents in a run's latent index, in the terminal."""

import argparse
import shutil
import sys

from dist_sae.commands import shared


def add(commands: shared.Commands) -> None:
    """Add the command."""
    text = "show what latents fire on, from the index that `dist-sae index` builds"
    parser = shared.add_command(commands, "latents", main, text)
    parser.add_argument(
        "latents",
        metavar="N",
        nargs="*",
        type=int,
        help="latents to show (default: some of the densest, some of the rarest, and random ones)",
    )
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--text", help="show the latents that fire on each token of this text")
    asked.add_argument(
        "--like",
        type=int,
        metavar="N",
        help="show the latents nearest to this one, and those often active with it",
    )
    asked.add_argument(
        "--token", help='show latents whose largest activations are on this token, such as " dog"'
    )
    asked.add_argument("--regex", help="the same, for tokens that match this pattern")
    parser.add_argument("--index", metavar="NAME", help="name of the index (default: the newest)")


def main(options: argparse.Namespace) -> None:
    """Print what the options select from the index."""
    run = shared.load(options)
    if options.text is not None:
        from dist_sae.index.query import Index
        from dist_sae.notebook.run import OpenedRun
        from dist_sae.report.terminal import text_lines
        from dist_sae.storage import open_store

        runs = open_store(run.store.runs, run.store.s3)
        step = Index(runs, run.name, options.index).manifest.step if options.index else None
        found = OpenedRun(run).active_on(options.text, step=step)
        shared.print_lines(options, [each._asdict() for each in found], text_lines(found))
        return
    from dist_sae.report.terminal import Explorer, Style

    width = shutil.get_terminal_size((100, 24)).columns if sys.stdout.isatty() else 100
    explorer = Explorer(run, options.index, Style(width, bold=sys.stdout.isatty()))
    if options.like is not None:
        answer = explorer.similar(options.like)
    elif options.token is not None:
        answer = explorer.with_token(options.token)
    elif options.regex is not None:
        answer = explorer.with_regex(options.regex)
    elif options.latents:
        answer = explorer.latents(options.latents)
    else:
        answer = explorer.overview()
    shared.print_lines(options, answer.content, answer.lines)
