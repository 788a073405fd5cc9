"""Writing the pages of some latents as files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_sae.browser.pages import MAP_NAME, Pages, compare_name, file_name
from dist_sae.errors import ConfigError
from dist_sae.notebook.run import OpenedRun
from dist_sae.report.latents import choose_latents


def write_pages(
    run: OpenedRun,
    index: str | None,
    folder: Path,
    latents: Sequence[int] | None,
    other: OpenedRun | None = None,
) -> dict[str, Any]:
    """Write a list of latents and a page for each, which need no server and no network.

    Args:
        run: The run.
        index: Name of the index; None takes the complete index of the latest step.
        folder: Folder for the files. Files with other names in it are not touched.
        latents: The latents; None takes the latents of the report.
        other: Another run. Each latent is compared with that run's nearest latent.

    Returns:
        `pages`, the number of files, and `browse`, the file to open.

    Raises:
        ConfigError: The folder cannot be written, or the other run cannot be compared.
        NoIndexError: There is no complete index.
        LatentNotFoundError: The dictionary has no such latent.
    """
    if latents is None:
        config = run.config
        latents = choose_latents(
            run.index(index).firings, config.evaluate.latents, config.train.seed
        )
    pages = Pages(run, index, latents, other)
    files = {file_name(latent): pages.latent(latent) for latent in latents}
    files["index.html"] = pages.chosen(latents)
    if other is not None:
        files |= {compare_name(latent): pages.compare(latent, None) for latent in latents}
    if pages.has_map:
        files[MAP_NAME] = pages.map()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"--static: {folder}: {exc.strerror}; choose a writable folder") from exc
    return {"pages": len(files), "browse": str(folder / "index.html")}
