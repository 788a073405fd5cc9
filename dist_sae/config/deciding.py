"""Which settings decide what comes out of a run; the others change how it is done."""

from typing import Any

import yaml

from dist_sae.config import Run, dump_run

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
    settings: dict[str, Any] = yaml.safe_load(dump_run(run))
    for free in _FREE_SETTINGS:
        section, _, key = free.partition(".")
        (settings[section] if key else settings).pop(key or section, None)
    return settings
