"""`dist-sae browse`: pages of a latent index, for a web browser."""

import argparse
import contextlib
from pathlib import Path

from dist_sae.commands import shared

_PORT = 8765


def add(commands: shared.Commands) -> None:
    """Add the command."""
    text = "browse the latents of a run, by the index that `dist-sae index` makes"
    parser = shared.add_command(commands, "browse", main, text)
    parser.add_argument("--index", metavar="NAME", help="name of the index (default: the newest)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; anywhere but on this machine the printed URL has a token",
    )
    parser.add_argument("--port", type=int, default=_PORT, help="0: any free port")
    parser.add_argument(
        "--static", type=Path, metavar="FOLDER", help="write the pages of some latents, and end"
    )
    parser.add_argument(
        "--latents",
        type=int,
        nargs="+",
        metavar="N",
        help="with --static: these latents (default: those of the report)",
    )


def main(options: argparse.Namespace) -> None:
    """Serve pages until interrupted, or write them."""
    run = shared.load(options)
    from dist_sae.errors import ConfigError
    from dist_sae.notebook.run import OpenedRun

    if options.latents and not options.static:
        raise ConfigError("browse: --latents: is for --static; give both")
    opened = OpenedRun(run)
    if options.static:
        from dist_sae.browser.files import write_pages

        shared.print_result(
            options, write_pages(opened, options.index, options.static, options.latents)
        )
        return
    from dist_sae.browser.pages import Pages
    from dist_sae.browser.server import serve

    pages = Pages(opened, options.index)
    with serve(pages, options.host, options.port) as (server, url):
        shared.print_result(options, {"index": pages.place, "browse": url})
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
