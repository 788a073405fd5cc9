"""Files of a corpus: their paths, local copies and checksums.

Compressed, parquet and remote files are unpacked once per process into a scratch folder, so that
each span of documents can be read as one byte range.
"""

import hashlib
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Set
from functools import cache, partial
from glob import glob
from itertools import chain
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from dist_sae.config.data import CorpusConfig, DatasetCorpus, FilesCorpus, S3Config, SyntheticCorpus
from dist_sae.data.formats import (
    FORMATS,
    Texts,
    json_lines,
    numbers,
    open_dataset,
    os_errors,
    plain_text,
    unpack,
)
from dist_sae.errors import CorpusError
from dist_sae.hub import dataset_commit
from dist_sae.storage import ObjectStore, open_store

logger = logging.getLogger(__name__)

PIECE_BYTES = 64 * 2**20
"""Size of each range request of a download."""


class CorpusFile(BaseModel):
    """One file of the corpus, as recorded when the plan was made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    documents: int
    fingerprint: str
    """sha256 of the unpacked bytes. For a data set: of its documents' checksums; for a synthetic
    corpus: of its settings."""
    bytes: int | None = Field(None, exclude_if=lambda size: size is None)
    """Size of the stored file; None if the corpus is not files, and in plans of earlier
    versions."""


class CorpusFiles:
    """Files that a run names. A data set or a synthetic corpus counts as one file.

    Args:
        s3: Settings for reading `s3://` files.
    """

    def __init__(self, config: CorpusConfig, s3: S3Config) -> None:
        self.config = config
        # caches with one entry per file
        self.names = cache(self._find_names)
        """Names of the files, in order."""
        self.texts = cache(self._open)
        """Reader of the texts of a file, by its name."""
        self.size = cache(self._measure)
        """Size of a stored file in bytes, by its name."""
        self._named = cache(lambda: dict.fromkeys(self.names()))
        self._namesakes = cache(self._find_namesakes)
        self._local = cache(self._unpack)
        self._hash = cache(_hash)  # keyed by path and `state`
        self._bucket = cache(lambda bucket: open_store(f"s3://{bucket}", s3))
        self._scratch = cache(self._make_scratch)

    def hash_again(self) -> None:
        """Forget cached fingerprints, because a file may change but keep its size and time."""
        self._hash.cache_clear()

    def pin(self) -> str | None:
        """Pin a data set to its current commit on the hub; return it, or None if it is unknown."""
        config = self.config
        if not isinstance(config, DatasetCorpus) or Path(os.path.expanduser(config.name)).exists():
            return None
        commit = dataset_commit(config.name, config.revision)
        if commit is None:
            logger.warning(
                "corpus.name %s: the hub did not report a commit; "
                "if its text changes later, producers will refuse it",
                config.name,
            )
            return None
        self.config = config.model_copy(update={"revision": commit})
        return commit

    def find(self, file: CorpusFile, planned: Set[str]) -> str:
        """Find the current path of a planned file: one of the run's files, or its planned path.

        Args:
            file: File as recorded in the plan.
            planned: Names of all planned files.

        Raises:
            CorpusError: No file has the planned content.
        """
        if not isinstance(self.config, FilesCorpus):
            return self.names()[0]
        names: Mapping[str, None] = {}
        problem: CorpusError | None = None
        try:
            names = self._named()
        except CorpusError as exc:  # a relative path may not exist here; the plan has absolute ones
            problem = exc
        for name in self._candidates(file, names, planned):
            try:
                if self.fingerprint(name) == file.fingerprint:
                    return name
            except CorpusError as exc:
                if name in names:
                    problem = problem or exc
        if file.name in names:
            raise problem or changed(file.name)
        raise problem or CorpusError(
            f"corpus.files: none has the content that {file.name} had when the plan was made; "
            f"add that file, or start a new activation set"
        )

    def _candidates(
        self, file: CorpusFile, names: Mapping[str, None], planned: Set[str]
    ) -> Iterator[str]:
        """Yield the paths where a planned file may be, likely ones first."""
        if file.name in names:
            yield file.name
        namesakes = self._namesakes().get(Path(file.name).name, {}) if names else {}
        for name in chain(namesakes, (name for name in names if name not in namesakes)):
            # skip other planned files of a different size, which would be fetched for nothing
            other = name in planned and file.bytes not in (None, self.size(name))
            if name != file.name and not other:
                yield name
        if file.name not in names and not file.name.startswith("s3://"):
            yield file.name

    def _find_names(self) -> list[str]:
        config = self.config
        if isinstance(config, SyntheticCorpus):
            return ["synthetic"]
        if isinstance(config, DatasetCorpus):
            return [os.path.expanduser(config.name)]
        names: list[str] = []
        for pattern in config.files:
            if pattern.startswith("s3://"):
                names.append(pattern)
                continue
            path = Path(os.path.expanduser(pattern))
            matches = [str(path)] if path.exists() else sorted(glob(str(path), recursive=True))
            if not matches:
                raise CorpusError(f"{pattern}: no such file; correct corpus.files")
            names += [str(Path(match).absolute()) for match in matches]
        return list(dict.fromkeys(names))  # two patterns may match one file

    def _find_namesakes(self) -> dict[str, dict[str, None]]:
        """Group the files by the last component of their paths."""
        found: dict[str, dict[str, None]] = {}
        for name in self.names():
            found.setdefault(Path(name).name, {})[name] = None
        return found

    def _open(self, name: str) -> Texts:
        config = self.config
        if isinstance(config, SyntheticCorpus):
            return partial(numbers, config.documents)
        if isinstance(config, DatasetCorpus):
            return open_dataset(config)
        if name.endswith(".txt"):
            return partial(plain_text, name, self._local(name), config.txt_documents)
        return partial(json_lines, name, self._local(name), config.text_field)

    def _unpack(self, name: str) -> Path:
        """Return the path of the file as plain text or JSON lines: itself, or a local copy."""
        assert isinstance(self.config, FilesCorpus)
        if not name.endswith(FORMATS):
            raise CorpusError(f"{name}: unknown file type; use one of {', '.join(FORMATS)}")
        with os_errors(name):
            path = self._download(name) if name.startswith("s3://") else Path(name)
            if name.endswith((".txt", ".jsonl")):
                return path
            unpacked = self._scratch() / f"{_hex(name)}.unpacked"
            unpack(name, path, unpacked, self.config.text_field)
            return unpacked

    def _download(self, name: str) -> Path:
        store, key = self._object(name)
        size = self.size(name)
        path = self._scratch() / _hex(name)
        with path.open("wb") as copy:
            for start in range(0, size, PIECE_BYTES):
                copy.write(store.get(key, start, min(size, start + PIECE_BYTES)))
        return path

    def _measure(self, name: str) -> int:
        """Return the size of a stored file in bytes."""
        if not name.startswith("s3://"):
            with os_errors(name):
                return Path(name).stat().st_size
        store, key = self._object(name)
        size = store.size(key)
        if size is None:
            raise CorpusError(f"{name}: no such object; correct corpus.files")
        return size

    def _object(self, name: str) -> tuple[ObjectStore, str]:
        bucket, _, key = name.removeprefix("s3://").partition("/")
        return self._bucket(bucket), key

    def _make_scratch(self) -> Path:
        """Create a folder that is deleted with this object."""
        folder = tempfile.mkdtemp(prefix="dist_sae-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return Path(folder)

    def fingerprint(self, name: str) -> str:
        """Return the sha256 of the unpacked file."""
        state = self.state(name)
        with os_errors(name):
            return self._hash(self._local(name), state)

    def state(self, name: str) -> tuple[int, int, int]:
        """Return (inode, size, time in ns), which change if the unpacked file is rewritten."""
        with os_errors(name):
            status = self._local(name).stat()
        return status.st_ino, status.st_size, status.st_mtime_ns


def changed(name: str) -> CorpusError:
    """Return the error for text that differs from the plan."""
    return CorpusError(
        f"{name}: changed since the plan was made; restore it or start a new activation set"
    )


def _hash(path: Path, _: tuple[int, int, int]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hex(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
