"""A run's folder, which says itself what run it is of: `<runs>/<run>/run.yaml`."""

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
    """Where a run's resolved run file is in the store of runs."""
    return f"{name}/{_RUN_FILE}"


def open_run(argument: str, overrides: Sequence[str] = ()) -> Run:
    """The run that a command was given.

    Args:
        argument: A run file, or a run's folder: a path or a URL. A folder may have been moved with
            all that is in it; it keeps its name.
        overrides: `section.key=value` strings.

    Raises:
        ConfigError: With one line for every problem.
        StoreError: The folder cannot be read.
    """
    is_url = "://" in argument
    if not is_url and not Path(argument).is_dir():
        return load_run(argument, overrides)
    place = argument if is_url else Path(os.path.abspath(argument)).as_uri()
    runs, _, name = place.removesuffix(f"/{_RUN_FILE}").rstrip("/").rpartition("/")
    store = parse_overrides(overrides).get("store", {})
    given = store.get("s3", {}) if isinstance(store, dict) else {}  # else refused with the rest
    try:
        s3 = S3Config.model_validate(given)
    except ValidationError as exc:
        raise ConfigError(f"--set store.s3: {exc.errors()[0]['msg']}") from exc
    run = _read(open_store(runs, s3), name, runs, overrides)
    if run is None:
        raise ConfigError(
            f"{argument}: holds no {_RUN_FILE}; give a run file, or the folder of a run that has "
            f"been trained (<store.runs>/<name>)"
        )
    return run


def begun_run(runs: ObjectStore, name: str) -> Run | None:
    """The run as trainers found it when they last began; None if none ever did.

    Raises:
        ConfigError: This version cannot read its run file.
    """
    return _read(runs, name, runs.url)


def _read(store: ObjectStore, name: str, runs: str, overrides: Sequence[str] = ()) -> Run | None:
    """The run in a folder, with the place of the folder."""
    try:
        text = store.get(run_file_key(name)).decode()
    except ObjectNotFoundError:
        return None
    origin = f"{runs}/{run_file_key(name)}"
    data = parse_run(text, origin)
    if data.get("name") != name:
        raise ConfigError(
            f"{origin}: is of run {data.get('name')}; a run's folder keeps the run's name, "
            f"by which its checkpoints list their parts"
        )
    data["store"] = {**(data.get("store") or {}), "runs": runs}
    return resolve_run(data, overrides, origin)
