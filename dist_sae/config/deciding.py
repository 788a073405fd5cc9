"""Which settings decide what comes out of a run; the others change how it is done."""

from collections.abc import Mapping
from typing import Any

import yaml

from dist_sae.config import Run, differences, dump_run

_OLD_DEAD_AFTER_ROWS = 10_000_000  # the default of runs that began before it followed train.rows
_FREE_SETTINGS = {
    "store",
    "processes",
    "evaluate",
    "telemetry",
    "cluster",
    "train.max_passes",  # later passes follow earlier ones: no batch changes
    "train.log_every_steps",
    "train.save_every_steps",
    "train.save_beside",
    "train.keep_checkpoints",
    "train.keep_every_steps",
    "train.keep_best",
    "train.heldout_rows",
    "train.missing_seconds",
    "train.lost_seconds",
    "train.hung_seconds",
}


def deciding(run: Run) -> dict[str, Any]:
    """The settings that what comes out depends on; a checkpoint carries them."""
    settings: dict[str, Any] = yaml.safe_load(dump_run(run.resolved()))
    for free in _FREE_SETTINGS:
        section, _, key = free.partition(".")
        (settings[section] if key else settings).pop(key or section, None)
    return settings


def changes(stored: Mapping[str, Any], run: Run) -> list[str]:
    """Where a run's settings differ from a checkpoint's: `["train.lr: 0.001 -> 0.002"]`."""
    old, new = dict(stored), deciding(as_begun(run, stored))
    if old["train"]["lr"] is None:  # left to the width, before checkpoints carried the number
        follows = run.model_copy(update={"train": run.train.model_copy(update={"lr": None})})
        old["train"] = {**old["train"], "lr": follows.lr}
    return differences(old, new)


def as_begun(run: Run, stored: Mapping[str, Any]) -> Run:
    """The run with the defaults of the time when it began, where its file leaves them open."""
    left_open = run.sae.model_copy(update={"dead_after_rows": None})
    follows = run.model_copy(update={"sae": left_open}).dead_after_rows
    was = stored["sae"]["dead_after_rows"]
    if was != _OLD_DEAD_AFTER_ROWS or run.dead_after_rows != follows:
        return run
    return run.model_copy(update={"sae": run.sae.model_copy(update={"dead_after_rows": was})})
