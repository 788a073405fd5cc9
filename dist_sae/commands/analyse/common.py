"""Functions shared by the analyses of `dist-sae analyse`: options, and output of findings."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dist_sae.commands import shared
from dist_sae.errors import ConfigError

if TYPE_CHECKING:
    from dist_sae.config import Run
    from dist_sae.report.outcome import Findings


def add_analysis(
    analyses: shared.Commands,
    name: str,
    main: shared.Main,
    text: str,
    *,
    several: bool = False,
) -> argparse.ArgumentParser:
    """Add an analysis, and return its parser, so that the caller can add options.

    Args:
        several: Whether the analysis can take several runs.
    """
    parser = shared.add_command(analyses, name, main, text)
    parser.set_defaults(what=name)
    if several:
        parser.add_argument("others", nargs="*", metavar="RUN", help="more runs")
    return parser


def run_analysis(
    options: argparse.Namespace,
    name: str,
    runs: "Sequence[Run]",
    title: str,
    settings: Mapping[str, Any],
    find: "Callable[[], Findings]",
) -> None:
    """Do an analysis, store the findings in the folder of the run or sweep, and print them.

    Args:
        options: Options of the command. `what` is the name of the analysis.
        name: Name of the run or sweep.
        runs: The runs to analyse. Each must have a checkpoint.
        title: Heading of the page.
        settings: Settings of the analysis.
        find: Function that computes the findings from the newest checkpoints.

    Raises:
        ConfigError: A run has no checkpoint, or a newer one was saved during the analysis.
    """
    from dist_sae.report.outcome import store_findings
    from dist_sae.storage import open_store

    store = open_store(runs[0].store.runs, runs[0].store.s3)
    checkpoints = _newest(runs)
    findings = find()
    if _newest(runs) != checkpoints:  # the findings may be from either checkpoint
        raise ConfigError(
            f"{name}: a newer checkpoint was saved during the analysis; index it and rerun"
        )
    outcome = store_findings(store, name, options.what, title, checkpoints, settings, findings)
    place = f"{store.url}/{name}/analysis/{options.what}/page.html"
    lines = [*outcome.summary, *(f"note: {line}" for line in outcome.caveats), place]
    shared.print_lines(options, {**outcome.numbers, "page": place}, lines)


def _newest(runs: "Sequence[Run]") -> dict[str, str]:
    """Return the digests of the runs' newest checkpoints, by run name."""
    from dist_sae.checkpoint.trained import find_checkpoint, no_checkpoint_error
    from dist_sae.storage import open_store

    digests = {}
    for run in runs:
        store = open_store(run.store.runs, run.store.s3)
        if (checkpoint := find_checkpoint(store, run, None)) is None:
            raise no_checkpoint_error(store, run)
        digests[run.name] = checkpoint.digest
    return digests
