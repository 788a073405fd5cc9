"""`dist-sae analyse map`: a map of all latents of a dictionary."""

import argparse
from typing import TYPE_CHECKING

from dist_sae.commands import shared
from dist_sae.commands.analyse.common import add_analysis, run_analysis
from dist_sae.errors import ArgumentError

if TYPE_CHECKING:
    from dist_sae.report.outcome import Findings


def add(analyses: shared.Commands) -> None:
    """Add the analysis."""
    text = "map all latents: clusters, parents and children, and a page to zoom into"
    parser = add_analysis(analyses, "map", main, text)
    parser.add_argument(
        "--resamples",
        type=int,
        default=10,
        metavar="N",
        help="resamples that measure the stability of clusters (default: 10)",
    )


def main(options: argparse.Namespace) -> None:
    """Map the latents of a run's newest index."""
    if options.resamples < 1:
        raise ArgumentError(f"--resamples {options.resamples}: must be at least 1")
    run = shared.load(options)

    def find() -> "Findings":
        from dist_sae.analysis.indexed_run import open_indexed_dictionary
        from dist_sae.analysis.map import Settings, make_map

        settings = Settings(options.resamples, run.train.seed)
        return make_map(run.name, open_indexed_dictionary(run), settings)

    settings = {"resamples": options.resamples, "seed": run.train.seed}
    run_analysis(options, run.name, [run], "Map of the latents", settings, find)
