"""Old names of run-file keys. They still work, with one warning each."""

import logging
from collections.abc import Mapping
from typing import Any

from dist_sae.logs import is_supervised

logger = logging.getLogger(__name__)

RENAMED = {
    "model.shards": "model.tensor_parallel",
    "processes.shards": "processes.latent_shards",
    "train.missing_seconds": "timeouts.missing_seconds",
    "train.lost_seconds": "timeouts.lost_seconds",
    "train.hung_seconds": "timeouts.hung_seconds",
    "train.save_beside": "train.save_in_background",
}
"""Mapping from old to new `section.key`."""
warned = set[str]()
"""Old names for which this process has logged a warning."""


def with_new_names(data: Mapping[str, Any]) -> dict[str, Any]:
    """Move the values of renamed keys to their new names.

    Args:
        data: Sections of a run file that have not been validated yet.

    Raises:
        ValueError: A key is given under both names.
    """
    renamed, problems = dict(data), []
    for old, new in RENAMED.items():
        (section, key), (new_section, new_key) = old.split("."), new.split(".")
        there = renamed.get(section)
        if not isinstance(there, Mapping) or key not in there:
            continue
        target = {} if renamed.get(new_section) is None else renamed[new_section]
        if not isinstance(target, Mapping):
            continue  # validation reports it
        if new_key in target:
            problems.append(f"{old}: was renamed to {new}, which is also given; leave {old} out")
        renamed[section] = {name: value for name, value in there.items() if name != key}
        target = renamed[section] if section == new_section else target
        renamed[new_section] = {**target, new_key: there[key]}
    if problems:
        raise ValueError("\n".join(problems))
    return renamed


def warn_renamed(old: str, origin: str) -> None:
    """Warn, once per process, that a key has a new name.

    Args:
        old: The key as the user wrote it.
    """
    if old in RENAMED and old not in warned and not is_supervised():  # its parent has warned
        warned.add(old)
        logger.warning("%s: %s was renamed to %s", origin, old, RENAMED[old])
