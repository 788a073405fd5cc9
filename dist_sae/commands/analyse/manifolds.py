"""`dist-sae analyse manifolds`: features that are rings or other manifolds instead of lines."""

import argparse
from typing import TYPE_CHECKING

from dist_sae.commands import shared
from dist_sae.commands.analyse.common import add_analysis, run_analysis
from dist_sae.errors import ArgumentError

if TYPE_CHECKING:
    from dist_sae.report.outcome import Findings


def add(analyses: shared.Commands) -> None:
    """Add the analysis."""
    text = "find groups of latents that form one multidimensional feature, such as a ring"
    parser = add_analysis(analyses, "manifolds", main, text)
    parser.add_argument(
        "--cosine", type=float, default=0.5, help="least cosine of joined latents (default: 0.5)"
    )
    parser.add_argument(
        "--least", type=int, default=3, metavar="N", help="fewest latents of a group (default: 3)"
    )
    parser.add_argument(
        "--most", type=int, default=100, metavar="N", help="most latents of a group (default: 100)"
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=2000,
        metavar="N",
        help="most rows per group to measure (default: 2000)",
    )


def main(options: argparse.Namespace) -> None:
    """Search a run's newest index for groups of latents."""
    if not 0 < options.cosine < 1:
        raise ArgumentError(f"--cosine {options.cosine:g}: must be between 0 and 1")
    if not 2 <= options.least <= options.most:  # noqa: PLR2004 - one latent is a line
        raise ArgumentError(
            f"--least {options.least}, --most {options.most}: must be 2 <= least <= most"
        )
    run = shared.load(options)
    from dist_sae.analysis.manifolds import Settings, find_manifolds
    from dist_sae.analysis.measure import LEAST_ROWS

    if options.rows < LEAST_ROWS:
        raise ArgumentError(f"--rows {options.rows}: a group needs at least {LEAST_ROWS}")
    settings = Settings(options.cosine, options.least, options.most, options.rows)

    def find() -> "Findings":
        from dist_sae.analysis.indexed_run import open_indexed_dictionary

        return find_manifolds(open_indexed_dictionary(run), settings)

    run_analysis(options, run.name, [run], "Multidimensional features", settings._asdict(), find)
