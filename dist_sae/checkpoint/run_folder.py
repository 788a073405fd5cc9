"""Run folders and the run file in each of them: `<runs>/<run>/run.yaml`."""

import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from dist_sae.config import Run, load_run, parse_overrides, parse_run, resolve_run
from dist_sae.config.data import S3Config
from dist_sae.errors import ConfigError, ObjectNotFoundError
from dist_sae.storage import ObjectStore, open_store

_RUN_FILE = "run.yaml"


def run_file_key(name: str) -> str:
    """Return the key of a run's resolved run file in the store of runs."""
    return f"{name}/{_RUN_FILE}"


def open_run(argument: str, overrides: Sequence[str] = ()) -> Run:
    """Read the run file or run folder that was passed to a command.

    Args:
        argument: Path of a run file, or path or URL of a run folder. A run folder may have been
            moved as a whole, but must keep its name.
        overrides: `section.key=value` strings.

    Raises:
        ConfigError: The run file is invalid. The message has one line for every problem.
        StoreError: The folder cannot be read.
    """
    is_url = "://" in argument
    if not is_url and not Path(argument).is_dir():
        return load_run(argument, overrides)
    place = argument if is_url else Path(os.path.abspath(argument)).as_uri()
    runs, _, name = place.removesuffix(f"/{_RUN_FILE}").rstrip("/").rpartition("/")
    store = parse_overrides(overrides).get("store", {})
    given = store.get("s3", {}) if isinstance(store, dict) else {}  # else rejected below
    try:
        s3 = S3Config.model_validate(given)
    except ValidationError as exc:
        raise ConfigError(f"--set store.s3: {exc.errors()[0]['msg']}") from exc
    run = _read(open_store(runs, s3), name, runs, overrides)
    if run is None:
        raise ConfigError(
            f"{argument}: has no {_RUN_FILE}; pass a run file, or the folder of a trained run "
            f"(<store.runs>/<name>)"
        )
    return run


def started_run(runs: ObjectStore, name: str) -> Run | None:
    """Read the run file that training last started with. None if it has never started.

    Raises:
        ConfigError: The run file cannot be read by this version.
    """
    return _read(runs, name, runs.url)


def check_kind(runs: ObjectStore, run: Run) -> None:
    """Check that a run does not use the folder of a sweep, and a sweep not that of a run.

    Raises:
        ConfigError: The folder belongs to the other kind.
    """
    key = run_file_key(run.name)
    try:
        data = parse_run(runs.get(key).decode(), f"{runs.url}/{key}")
    except ObjectNotFoundError:
        return
    was, now = ("a sweep" if sweep else "a run" for sweep in (data.get("sweep"), run.sweep))
    if was != now:
        raise ConfigError(
            f"{runs.url}/{run.name}: belongs to {was}, but this is {now}; choose another name"
        )


def _read(store: ObjectStore, name: str, runs: str, overrides: Sequence[str] = ()) -> Run | None:
    """Read the run in a folder. `store.runs` is set to where the folder actually is."""
    try:
        text = store.get(run_file_key(name)).decode()
    except ObjectNotFoundError:
        return None
    origin = f"{runs}/{run_file_key(name)}"
    data = parse_run(text, origin)
    if data.get("name") != name:
        raise ConfigError(
            f"{origin}: belongs to run {data.get('name')}; rename the folder back to that name, "
            f"because checkpoints refer to their parts by it"
        )
    data["store"] = {**(data.get("store") or {}), "runs": runs}
    return resolve_run(data, overrides, origin)
