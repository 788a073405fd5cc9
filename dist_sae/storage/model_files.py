"""Local copies of models that are folders of a store (`model.path: s3://bucket/folder`).

The files are fetched once into a folder on this machine, which pods may share (`cluster.cache`).
The folder is named after the store's listing (names, sizes, entity tags). So a model that is
rewritten gets a new folder, and a model that is moved keeps its folder. A file appears only when it
is complete, together with its checksum, and each process compares the two before it uses the file.
Only files that `transformers` reads as data are fetched, and weights only as safetensors, because a
pickle can run any code.
"""

import fcntl
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import xxhash

from dist_sae.config.data import HuggingFaceModel
from dist_sae.errors import ModelError
from dist_sae.storage import Entry, ObjectStore, open_store

logger = logging.getLogger(__name__)

WEIGHTS = ".safetensors"
_DATA = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")
_INDEX = "model.safetensors.index.json"
_PIECE_BYTES = 128 * 2**20
_evicted = set[Path]()


def name_or_path(model: HuggingFaceModel, *, weights: bool) -> str:
    """Return where `transformers` finds a model: a name on the hub, or a folder on this machine.

    If the model is in a store, files that are missing from that folder are fetched first.

    Args:
        model: One model; `model.other` is ignored.
        weights: Whether the weights are needed too.

    Raises:
        ModelError: The store lacks files of the model, or they cannot be stored on this machine.
    """
    if not model.is_stored:
        return model.place
    store, entries = _listing(model)
    folder = _folder(entries)
    try:
        (folder / "checksums").mkdir(parents=True, exist_ok=True)
        for name, entry in entries.items():
            if weights or not name.endswith(WEIGHTS):
                with _file_lock(folder / f".{name}") as part:
                    if not _is_whole(folder, entry):
                        _fetch(store, entry, folder, part)
    except OSError as exc:
        raise ModelError(
            f"model.path {model.path}: cannot be stored in {folder}: {exc.strerror or exc}; "
            f"free space there (in a pod: cluster.PART.scratch, or cluster.cache), or set HF_HOME"
        ) from exc
    return str(folder)


def evict(models: Iterable[HuggingFaceModel]) -> bool:
    """Delete the local files of models in stores, so that they are fetched again when needed.

    Returns:
        True if the files of any model were deleted. A model's files are deleted only once per
        process, because files that are the same after a second fetch are not damaged.
    """
    there = [_folder(_listing(model)[1]) for model in models if model.is_stored]
    fresh = [folder for folder in there if folder not in _evicted]
    for folder in fresh:
        _evicted.add(folder)
        for file in folder.iterdir():
            if file.is_file():
                file.unlink(missing_ok=True)
    return bool(fresh)


def weight_checksums(model: HuggingFaceModel) -> dict[str, str]:
    """Return checksums (xxh3, 128 bits) of the weights of a model in a store, by file name.

    Files that are not on this machine are read from the store but not saved.
    """
    store, entries = _listing(model)
    folder = _folder(entries)
    return {
        name: checksum(folder / name)
        if (folder / name).exists()
        else _digest(_ranges(store, entry))
        for name, entry in sorted(entries.items())
        if name.endswith(WEIGHTS)
    }


def checksum(path: Path) -> str:
    """Compute the checksum (xxh3, 128 bits) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def _listing(model: HuggingFaceModel) -> tuple[ObjectStore, dict[str, Entry]]:
    """Return the store of a model, and the objects in it that belong to the model.

    Raises:
        ModelError: Some of the model's objects are missing.
    """
    store = open_store(model.path, model.s3)
    found = {
        entry.key: entry
        for entry in store.entries()
        if any(fnmatch(entry.key, kind) for kind in (*_DATA, f"*{WEIGHTS}"))
        and "/" not in entry.key
    }
    missing = ["config.json"] * ("config.json" not in found)
    if not any(fnmatch(name, kind) for name in found for kind in _TOKENIZERS):
        missing.append("tokenizer (tokenizer.json)")
    if _INDEX in found:
        missing += sorted(_named_in(store.get(_INDEX), model) - found.keys())
    elif not any(name.endswith(WEIGHTS) for name in found):
        missing.append("weights (*.safetensors)")
    if missing:
        raise ModelError(
            f"model.path {model.path}: has no {', no '.join(missing)}; copy the model's "
            f"whole folder there, with weights in safetensors"
        )
    return store, found


def _named_in(index: bytes, model: HuggingFaceModel) -> set[str]:
    """Return the names of the files that an index of weights lists."""
    try:
        return {str(name) for name in json.loads(index)["weight_map"].values()}
    except (ValueError, LookupError, TypeError, AttributeError) as exc:
        raise ModelError(
            f"model.path {model.path}: {_INDEX} is not an index of weights ({exc}); copy it again"
        ) from exc


def _folder(entries: dict[str, Entry]) -> Path:
    """Return a model's folder on this machine. It depends on the objects, not on their location."""
    objects = sorted((entry.key, entry.bytes, entry.tag) for entry in entries.values())
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    digest = hashlib.sha256(json.dumps(objects).encode()).hexdigest()[:32]
    return Path(home).expanduser() / "store" / digest


def _is_whole(folder: Path, entry: Entry) -> bool:
    """Return whether the file exists with the bytes that were fetched."""
    file = folder / entry.key
    if not file.exists():
        return False
    there = file.stat()
    if _checksum_matches(file, there.st_ino, there.st_mtime_ns):
        return True
    logger.warning("%s: is damaged; downloading it again", file)
    return False


@cache
def _checksum_matches(file: Path, *_: int) -> bool:
    """Compare a file with its checksum, once per process unless its inode or time changes."""
    stored = file.parent / "checksums" / file.name
    return stored.exists() and stored.read_text() == checksum(file)


def _fetch(store: ObjectStore, entry: Entry, folder: Path, part: Path) -> None:
    """Fetch an object into its file, which appears only when it is complete."""
    logger.info("downloading %s/%s, %.2f GB", store.url, entry.key, entry.bytes / 1e9)
    hashed = xxhash.xxh3_128()
    with part.open("wb") as file:
        for piece in _ranges(store, entry):
            hashed.update(piece)
            file.write(piece)
        n_bytes = file.tell()
        file.flush()
        os.fsync(file.fileno())
    if n_bytes != entry.bytes:
        raise ModelError(
            f"{store.url}: {entry.key} has {n_bytes} bytes, but had {entry.bytes} when it was "
            f"listed; do not change the model while it is in use"
        )
    (folder / "checksums" / entry.key).write_text(hashed.hexdigest())
    part.replace(folder / entry.key)


def _ranges(store: ObjectStore, entry: Entry) -> Iterator[bytes]:
    for start in range(0, entry.bytes, _PIECE_BYTES):
        yield store.get(entry.key, start, min(entry.bytes, start + _PIECE_BYTES))


def _digest(pieces: Iterator[bytes]) -> str:
    hashed = xxhash.xxh3_128()
    for piece in pieces:
        hashed.update(piece)
    return hashed.hexdigest()


@contextmanager
def _file_lock(path: Path) -> Iterator[Path]:
    """Keep other processes from fetching the same file, and yield a path to write it to.

    On a file system without locks, each process fetches the file to a separate path.
    """
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        part = path.with_name(f"{path.name}.part")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
        try:
            yield part
        finally:
            with suppress(FileNotFoundError):
                part.unlink()
