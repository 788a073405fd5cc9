"""`dist-sae analyse`: analyses of trained dictionaries, with one file per analysis."""

from typing import Any

from dist_sae.commands import shared
from dist_sae.commands.analyse import coverage, dark_matter, latent_map, manifolds, sensitivity

_ANALYSES: tuple[Any, ...] = (coverage, dark_matter, manifolds, latent_map, sensitivity)


def add(commands: shared.Commands) -> None:
    """Add the command."""
    text = "run an analysis of trained dictionaries; its results are stored with the run"
    analyses = shared.add_group(commands, "analyse", text, "WHAT")
    for analysis in _ANALYSES:
        analysis.add(analyses)
