"""The hub of models and data sets: which commit a name stands for, and whether it was in reach."""

import re
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub

_OUT_OF_REACH = {  # of httpx, requests and huggingface_hub, none of which every program loads
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
    """The commit of a model whose configuration was loaded before; None where there is none.

    A revision that is a commit is taken as it is.
    """
    if revision and _COMMIT.fullmatch(revision):
        return revision
    try:
        path = huggingface_hub.try_to_load_from_cache(model, "config.json", revision=revision)
    except ValueError:  # no name that a hub could have
        return None
    return Path(path).parent.name if isinstance(path, str) else None


def dataset_commit(name: str, revision: str | None) -> str | None:
    """The commit that a data set's revision stands for now; None if the hub does not tell.

    A revision that is a commit is taken as it is.
    """
    if revision and _COMMIT.fullmatch(revision):
        return revision
    try:
        return huggingface_hub.HfApi().dataset_info(name, revision=revision).sha
    except Exception:  # of several libraries; loading the data set says what is wrong, if it fails
        return None


def is_out_of_reach(error: BaseException) -> bool:
    """Whether the hub could not be asked or had no answer; waiting may mend that."""
    return any(
        type(cause).__name__ in _OUT_OF_REACH or _is_passing(cause) for cause in causes(error)
    )


def _is_passing(error: BaseException) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return isinstance(status, int) and (status == _TOO_MANY or status >= _SERVER_ERROR)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it followed from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
