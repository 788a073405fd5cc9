"""Pages of some latents, as files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_sae.browser.pages import Pages, file_name
from dist_sae.notebook.run import OpenedRun
from dist_sae.report.latents import choose_latents


def write_pages(
    run: OpenedRun, index: str | None, folder: Path, latents: Sequence[int] | None
) -> dict[str, Any]:
    """Write a list of latents and a page of each, which need no server and no network.

    Args:
        run: The run.
        index: Name of the index; None takes the complete one of the last step.
        folder: Takes the files; what has other names there stays.
        latents: The latents; None takes those of the report.

    Returns:
        `pages`, their number; `browse`, the file to open.

    Raises:
        NoIndexError: There is no complete index.
        LatentNotFoundError: There is no such latent.
    """
    if latents is None:
        config = run.config
        latents = choose_latents(
            run.index(index).firings, config.evaluate.latents, config.train.seed
        )
    pages = Pages(run, index, latents)
    folder.mkdir(parents=True, exist_ok=True)
    for latent in latents:
        (folder / file_name(latent)).write_text(pages.latent(latent), encoding="utf-8")
    first = folder / "index.html"
    first.write_text(pages.chosen(latents), encoding="utf-8")
    return {"pages": len(latents), "browse": str(first)}
