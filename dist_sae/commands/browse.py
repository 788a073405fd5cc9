"""`dist-sae browse`: the pages of a latent index in a web browser."""

import argparse
import contextlib
from pathlib import Path

from dist_sae.commands import shared

_PORT = 8765


def add(commands: shared.Commands) -> None:
    """Add the command."""
    text = "browse the latents of a run in the index that `dist-sae index` builds"
    parser = shared.add_command(commands, "browse", main, text)
    parser.add_argument("--index", metavar="NAME", help="name of the index (default: the newest)")
    parser.add_argument(
        "--compare",
        metavar="RUN",
        help="another run, whose nearest latent is shown next to each latent of RUN",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; if other machines can reach it, the printed URL has a token",
    )
    parser.add_argument(
        "--port", type=int, default=_PORT, help="port to listen on; 0: any free port"
    )
    parser.add_argument(
        "--static", type=Path, metavar="FOLDER", help="write the pages of some latents and exit"
    )
    parser.add_argument(
        "--latents",
        type=int,
        nargs="+",
        metavar="N",
        help="with --static: latents to write (default: those of the report)",
    )


def main(options: argparse.Namespace) -> None:
    """Serve pages until interrupted, or write them to files."""
    run = shared.load(options)
    from dist_sae.errors import ConfigError
    from dist_sae.notebook.run import OpenedRun, open_run

    if options.latents and not options.static:
        raise ConfigError("browse: --latents: needs --static; give both")
    opened = OpenedRun(run)
    other = open_run(options.compare) if options.compare else None
    if options.static:
        from dist_sae.browser.files import write_pages

        place = options.static
        written = write_pages(opened, options.index, place, options.latents, other)
        shared.print_result(options, written)
        return
    from dist_sae.browser.pages import Pages
    from dist_sae.browser.server import serve

    pages = Pages(opened, options.index, other=other)
    with serve(pages, options.host, options.port) as (server, url):
        shared.print_result(options, {"index": pages.place, "browse": url})
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
