"""`dist-sae export`: writes a checkpoint as files of another library."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol

from dist_sae.checkpoint.layout import Checkpoint
from dist_sae.checkpoint.trained import (
    find_checkpoint,
    no_checkpoint_error,
    suffix,
    trained_run,
    use_checkpoint,
)
from dist_sae.config import Run, differences
from dist_sae.data.identity import plan_settings
from dist_sae.errors import ConfigError, ObjectNotFoundError
from dist_sae.interop import FORMATS, circuit_tracer, dictionary_learning, sae_lens, sparsify
from dist_sae.storage import UNMETERED, Meter, ObjectStore, open_store

logger = logging.getLogger(__name__)


class Format(Protocol):
    """A module for another library's format. Importing it does not import torch."""

    LIBRARY: str
    """The library's name, for messages."""
    CONFIG: str
    """File that describes the dictionary. Written last: if it exists, all other files do."""

    def problem(self, run: Run) -> str | None:
        """Return why the format cannot represent a run's dictionary, or None if it can."""

    def config(self, run: Run, checkpoint: Checkpoint) -> str:
        """Return the content of `CONFIG`, for a run as it was trained."""

    def files(
        self, run: Run, checkpoint: Checkpoint
    ) -> Mapping[str, Callable[[], Iterable[bytes]]]:
        """Return functions that yield the bytes of every other file, by file name."""

    def note(self, run: Run, checkpoint: Checkpoint) -> str | None:
        """Return what a user must know to use the export, or None."""


_FORMATS: dict[str, Format] = dict(
    zip(FORMATS, (sae_lens, sparsify, dictionary_learning, circuit_tracer), strict=True)
)


class Exported(NamedTuple):
    """The files of an export, and their run and checkpoint."""

    folder: str
    """Folder of the export in the store of runs."""
    files: tuple[str, ...]
    """Names of the files in the folder."""
    run: Run
    """The run as it was trained."""
    checkpoint: Checkpoint
    library: str


def problem(run: Run, format_name: str = FORMATS[0]) -> str | None:
    """Return why a format cannot represent a run's dictionary, or None if it can."""
    return _FORMATS[format_name].problem(run)


def export(
    run: Run, meter: Meter = UNMETERED, step: int | None = None, format_name: str = FORMATS[0]
) -> str:
    """Write a checkpoint in another library's format. Returns the folder's path or URL.

    Args and errors: see `export_checkpoint`.
    """
    done = export_checkpoint(run, meter, step, format_name)
    return f"{run.store.runs}/{done.folder}"


def export_checkpoint(
    run: Run, meter: Meter = UNMETERED, step: int | None = None, format_name: str = FORMATS[0]
) -> Exported:
    """Write a checkpoint in another library's format.

    The folder is `<run>/export/` for SAELens, and `<run>/export-<format>/` for others. If the step
    is not the newest, `-step-<step>` is appended to the folder's name. An export of the same
    checkpoint and settings is not written again. No weight matrix is in memory as a whole.

    Args:
        run: The run.
        meter: Receives the store's metrics.
        step: Step of the checkpoint; None for the newest.
        format_name: One of `FORMATS`.

    Raises:
        ConfigError: There is no checkpoint, or the format cannot represent its dictionary.
        PlanMismatchError: The run was trained with other settings.
    """
    chosen = _FORMATS[format_name]
    if reason := chosen.problem(run):
        raise ConfigError(
            f"{reason}; use the checkpoint itself: `dist-sae checkpoints convert` writes it as one "
            f"file"
        )
    runs = open_store(run.store.runs, run.store.s3, meter)
    checkpoint = find_checkpoint(runs, run, step)
    if checkpoint is None:
        raise no_checkpoint_error(runs, run)
    trained = trained_run(checkpoint, run).model_copy(update={"export": run.export})
    requested = run.filled(checkpoint.scalars["run"])  # open settings count as equal
    if changed := differences(plan_settings(trained), plan_settings(requested)):
        logger.warning(
            "the export states the run's training settings, not the run file's: %s",
            "; ".join(changed),
        )
    name = "export" if format_name == FORMATS[0] else f"export-{format_name}"
    folder = f"{run.name}/{name}{suffix(runs, run, checkpoint.step)}"
    if note := chosen.note(trained, checkpoint):
        logger.info("%s", note)
    if _is_complete(runs, folder, chosen, trained, checkpoint):
        logger.info("step %d is already exported: %s/%s", checkpoint.step, runs.url, folder)
        names = (*chosen.files(trained, checkpoint), chosen.CONFIG)
        return Exported(folder, names, trained, checkpoint, chosen.LIBRARY)

    def write(checkpoint: Checkpoint) -> Exported:
        files = chosen.files(trained, checkpoint)
        for name, content in files.items():
            runs.put_stream(f"{folder}/{name}", content)
        runs.put(f"{folder}/{chosen.CONFIG}", chosen.config(trained, checkpoint).encode())
        return Exported(folder, (*files, chosen.CONFIG), trained, checkpoint, chosen.LIBRARY)

    done = use_checkpoint(runs, run, step, write)
    assert done is not None, "there was a checkpoint"
    return done


def _is_complete(
    runs: ObjectStore, folder: str, chosen: Format, run: Run, checkpoint: Checkpoint
) -> bool:
    """Return whether a complete export of the same configuration exists."""
    wanted = chosen.config(run, checkpoint).encode()  # raises errors that need the checkpoint
    try:
        there = runs.get(f"{folder}/{chosen.CONFIG}")
    except ObjectNotFoundError:
        return False
    return there == wanted and all(
        runs.size(f"{folder}/{name}") is not None for name in chosen.files(run, checkpoint)
    )
