"""`dist-sae analyse dark-matter`: what dictionaries miss, and whether wider ones would find it."""

import argparse
from typing import TYPE_CHECKING

from dist_sae.commands import shared
from dist_sae.commands.analyse import common
from dist_sae.errors import ConfigError

if TYPE_CHECKING:
    from dist_sae.report.outcome import Findings

TITLE = "Dark matter"


def add(analyses: shared.Commands) -> None:
    """Add the analysis."""
    text = "what dictionaries miss: the tail, the parts of the error, what two seeds share"
    parser = common.add_analysis(analyses, "dark-matter", main, text, several=True)
    parser.add_argument(
        "--rows",
        type=int,
        metavar="N",
        help="rows that the linear part of the error is fitted to (default: 50 per dimension)",
    )
    parser.add_argument("--no-losses", action="store_true", help="skip the cross-entropies")


def main(options: argparse.Namespace) -> None:
    """Study each run, and count the latents that runs of equal width have in common."""
    name, runs = shared.load_several(options)
    if options.rows is not None and options.rows < 1:
        raise ConfigError(f"--rows: is {options.rows}; give a number of rows above 0")
    names = [run.name for run in runs]
    if twice := sorted({each for each in names if names.count(each) > 1}):
        raise ConfigError(f"{twice[0]}: is named twice; runs must have different names")
    settings = {"rows": options.rows, "losses": not options.no_losses}

    def find() -> "Findings":
        from dist_sae.analysis.dark_matter import study
        from dist_sae.analysis.dark_matter_findings import findings
        from dist_sae.analysis.seeds import find_overlap

        studies = [study(run, options.rows, losses=not options.no_losses) for run in runs]
        overlaps = {
            (one.name, other.name): find_overlap(one, other)
            for i, one in enumerate(runs)
            for other in runs[i + 1 :]
            if one.sae.n_latents == other.sae.n_latents
            and one.sae.has_latent_rows
            and (one.reads, one.writes) == (other.reads, other.writes)
        }
        return findings(studies, overlaps)

    common.run_analysis(options, name, runs, TITLE, settings, find)
