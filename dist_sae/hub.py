"""The Hugging Face hub: commits of models and data sets, uploads, and connection errors."""

import re
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub

from dist_sae.errors import ConfigError, HubUnavailableError

_UNAVAILABLE = {  # class names, since not every program imports httpx or requests
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
_NOT_ALLOWED = {401, 403}
_COMMIT = re.compile(r"[0-9a-f]{40}")


def cached_commit(model: str, revision: str | None) -> str | None:
    """Return the commit of a model in the local cache, or None if the model is not cached.

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
    """Return the commit that a data set's revision points to, or None if the hub is unavailable.

    A revision that is already a commit is returned unchanged.
    """
    if revision and _COMMIT.fullmatch(revision):
        return revision
    try:
        return huggingface_hub.HfApi().dataset_info(name, revision=revision).sha
    except Exception:  # of several libraries; loading the data set will report it
        return None


def upload(folder: Path, repository: str, message: str, *, public: bool, replace: bool) -> str:
    """Upload a folder's files to a model repository in one commit, and return the commit's URL.

    Args:
        folder: Folder to upload, with its subfolders.
        repository: Name of the repository, org/name. It is created if it does not exist.
        message: Commit message.
        public: Whether a new repository is public.
        replace: Whether to upload to a repository that already has files.

    Raises:
        ConfigError: The hub refuses, or the repository has files and `replace` is false.
        HubUnavailableError: The hub does not respond. Nothing was changed, except that an empty
            repository may have been created.
    """
    from huggingface_hub.errors import (  # imports httpx, which other functions do not need
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
    )

    api = huggingface_hub.HfApi()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        there = set(api.list_repo_files(repository)) - {".gitattributes"}
        if there and not replace:
            raise ConfigError(
                f"{repository}: already has {len(there)} files; choose another name, or use "
                f"--replace to add these files and overwrite those with the same name"
            )
        additions = [
            huggingface_hub.CommitOperationAdd(path.relative_to(folder).as_posix(), path)
            for path in files
        ]
        return str(api.create_commit(repository, additions, commit_message=message).commit_url)
    except (LocalTokenNotFoundError, RepositoryNotFoundError) as exc:
        raise ConfigError(_log_in(repository)) from exc
    except HFValidationError as exc:
        raise ConfigError(f"{repository}: not a repository name; use ORG/NAME") from exc
    except ConfigError:
        raise
    except Exception as exc:  # of several libraries, some with the hub's error as their cause
        if is_unavailable(exc):
            raise HubUnavailableError(
                f"{api.endpoint}: does not respond ({type(exc).__name__}); run the same command "
                f"again later"
            ) from exc
        refused = next((c for c in causes(exc) if isinstance(c, HfHubHTTPError)), None)
        if refused is None:
            raise
        if refused.response.status_code in _NOT_ALLOWED:
            raise ConfigError(_log_in(repository)) from exc
        reason = (refused.server_message or str(refused)).splitlines()[0]
        raise ConfigError(f"{repository}: the hub refused: {reason}") from exc


def _log_in(repository: str) -> str:
    return (
        f"{repository}: the current token does not allow writing there; log in with "
        f"`hf auth login`, or set HF_TOKEN"
    )


def is_unavailable(error: BaseException) -> bool:
    """Return True if the hub was unreachable or failed, so that a later attempt may succeed."""
    return any(
        type(cause).__name__ in _UNAVAILABLE or _is_transient(cause) for cause in causes(error)
    )


def _is_transient(error: BaseException) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return isinstance(status, int) and (status == _TOO_MANY or status >= _SERVER_ERROR)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, its cause, the cause's cause, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
