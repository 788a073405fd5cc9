"""The progress of an index, read from the objects that its workers have stored."""

import threading
from typing import NamedTuple

from dist_sae.checkpoint.trained import find_checkpoint
from dist_sae.config import Run
from dist_sae.index.layout import IndexFolder, IndexManifest, index_name, read_manifest
from dist_sae.storage import ObjectStore, open_store
from dist_sae.training.waiting import await_until


class IndexProgress(NamedTuple):
    """The state of an index: complete, or how far its workers have come."""

    manifest: IndexManifest
    units: int
    """Number of encoded units."""
    buckets: int
    """Number of merged buckets."""
    codes_deleted: bool
    """Whether the codes are deleted, which is the last step of an index."""

    def is_complete(self, run: Run, step: int) -> bool:
        """Return whether the index is complete, of this step, and has the run file's settings."""
        there = self.manifest
        asked = there.step == step and there.settings == run.index.deciding()
        return asked and self.codes_deleted and self.buckets == there.n_buckets


def index_progress(runs: ObjectStore, run: Run, step: int) -> IndexProgress | None:
    """Read the state of a step's index. Return None if no worker has begun it."""
    folder = IndexFolder(run.name, index_name(run, step))
    if runs.size(folder.manifest) is None:
        return None
    return IndexProgress(
        read_manifest(runs, folder),
        len(set(folder.units.numbers(runs))),
        len(set(folder.buckets.numbers(runs))),
        next(iter(runs.keys(folder.codes)), None) is None,
    )


def is_indexed(run: Run, stopping: threading.Event | None = None) -> bool:
    """Return whether the run's newest checkpoint has a complete index."""
    runs = open_store(run.store.runs, run.store.s3, None, stopping)
    checkpoint = find_checkpoint(runs, run, None)
    if checkpoint is None:
        return False
    progress = index_progress(runs, run, checkpoint.step)
    return (
        progress is not None
        and progress.manifest.checkpoint == checkpoint.digest
        and progress.is_complete(run, checkpoint.step)
    )


def await_index(run: Run, stopping: threading.Event) -> None:
    """Wait until the run's newest checkpoint has a complete index.

    Raises:
        Stopped: `stopping` was set first.
    """
    what = f"the index of {run.store.runs}/{run.name}"
    await_until(what, lambda: is_indexed(run, stopping), stopping)
