"""Commits of models and data sets on the Hugging Face hub, and detection of an unreachable hub."""

import re
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub

_OUT_OF_REACH = {  # by name: not every program loads httpx, requests or huggingface_hub
    "ConnectError",
    "ConnectTimeout",
    "ConnectionError",
    "LocalEntryNotFoundError",
    "PoolTimeout",
    "ReadError",
    "ReadTimeout",
    "RemoteProtocolError",
    "Timeout",
}
_TOO_MANY, _SERVER_ERROR = 429, 500
_COMMIT = re.compile(r"[0-9a-f]{40}")


def cached_commit(model: str, revision: str | None) -> str | None:
    """Commit of a model in the local cache; None if it is not cached.

    A revision that is already a commit is returned unchanged.
    """
    if revision and _COMMIT.fullmatch(revision):
        return revision
    try:
        path = huggingface_hub.try_to_load_from_cache(model, "config.json", revision=revision)
    except ValueError:  # not a valid name on the hub
        return None
    return Path(path).parent.name if isinstance(path, str) else None


def dataset_commit(name: str, revision: str | None) -> str | None:
    """Commit that a data set's revision points to now; None if the hub does not tell.

    A revision that is already a commit is returned unchanged.
    """
    if revision and _COMMIT.fullmatch(revision):
        return revision
    try:
        return huggingface_hub.HfApi().dataset_info(name, revision=revision).sha
    except Exception:  # from several libraries; loading the data set reports the cause
        return None


def is_out_of_reach(error: BaseException) -> bool:
    """True if the hub was unreachable or failed, so that a later attempt may succeed."""
    return any(
        type(cause).__name__ in _OUT_OF_REACH or _is_passing(cause) for cause in causes(error)
    )


def _is_passing(error: BaseException) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return isinstance(status, int) and (status == _TOO_MANY or status >= _SERVER_ERROR)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its chain of causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
