"""Documents: where they are, and how to read any of them without reading the rest.

A corpus is a list of files; a document is addressed by a `Span` of neighbouring documents in
one file. Compressed and remote files are unpacked once per process into a scratch folder, so
that every span is one ranged read.
"""

import bisect
import gzip
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from functools import cache
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict

from dist_sae.config.data import CorpusConfig, DatasetCorpus, FilesCorpus, S3Config, SyntheticCorpus
from dist_sae.errors import CorpusError
from dist_sae.storage import open_store

_PIECE_BYTES = 64 * 2**20  # of a download
_FORMATS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_MOST_SPANS = 200_000  # keeps plan.json small; neighbours travel together in larger corpora


class CorpusFile(BaseModel):
    """One file of the corpus, as it was when the plan was made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    documents: int
    fingerprint: str
    """sha256 of its bytes, or of what identifies it."""


class Span(NamedTuple):
    """Neighbouring documents of one file."""

    file: int
    first: int
    """Number of its first document within the file."""
    count: int
    start: int
    """Where it starts: byte of the unpacked file, or row."""
    stop: int


class Document(NamedTuple):
    """A text and the number that stands for it in every row made of it."""

    number: int
    text: str


class CorpusIndex(NamedTuple):
    """All that a plan needs to know of a corpus."""

    files: tuple[CorpusFile, ...]
    spans: list[Span]


class _Format(Protocol):
    """How one kind of file is indexed and read."""

    def offsets(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of every document."""
        ...

    def read(self, start: int, stop: int) -> Iterable[str]:
        """The texts of the documents in `[start, stop)`."""
        ...


class Corpus:
    """Reads documents of the corpus that a run names.

    Args:
        config: The corpus section of the run.
        s3: How to reach `s3://` files.
    """

    def __init__(self, config: CorpusConfig, s3: S3Config) -> None:
        self._config = config
        self._s3 = s3
        self._format = cache(self._open)  # one open file of each kind, unpacked once

    def index(self) -> CorpusIndex:
        """Read everything once: count, check and fingerprint it.

        Raises:
            CorpusError: A file is missing or unreadable, or there is no text at all.
        """
        offsets: list[list[tuple[int, int]]] = []
        files: list[CorpusFile] = []
        for name in self._names():
            places = list(self._format(name).offsets())
            offsets.append(places)
            files.append(
                CorpusFile(name=name, documents=len(places), fingerprint=self._fingerprint(name, places))
            )
        total = sum(file.documents for file in files)
        if total == 0:
            raise CorpusError(f"corpus: no documents in {', '.join(f.name for f in files)}; give files with text")
        per_span = -(-total // _MOST_SPANS)
        spans = [
            Span(number, first, len(group), group[0][0], group[-1][1])
            for number, places in enumerate(offsets)
            for first in range(0, len(places), per_span)
            if (group := places[first : first + per_span])
        ]
        return CorpusIndex(tuple(files), spans)

    def read(self, files: tuple[CorpusFile, ...], spans: Iterable[Span]) -> Iterator[Document]:
        """The documents of `spans`, numbered over the whole corpus in the order of `files`."""
        base = first_numbers(files)
        for span in spans:
            texts = self._format(files[span.file].name).read(span.start, span.stop)
            count = 0
            for count, text in enumerate(texts, start=1):
                yield Document(base[span.file] + span.first + count - 1, text)
            if count != span.count:
                raise CorpusError(
                    f"{files[span.file].name}: changed since the plan was made ({count} documents "
                    f"where {span.count} were); restore it or start a new activation set"
                )

    def _names(self) -> list[str]:
        config = self._config
        if isinstance(config, SyntheticCorpus):
            return ["synthetic"]
        if isinstance(config, DatasetCorpus):
            return [config.name]
        names: list[str] = []
        for pattern in config.files:
            matches = [pattern] if pattern.startswith("s3://") else sorted(glob(pattern, recursive=True))
            if not matches:
                raise CorpusError(f"{pattern}: no such file; correct corpus.files")
            names += [m if m.startswith("s3://") else str(Path(m).absolute()) for m in matches]
        return names

    def _open(self, name: str) -> _Format:
        config = self._config
        if isinstance(config, SyntheticCorpus):
            return _Numbers(config.documents)
        if isinstance(config, DatasetCorpus):
            return _Dataset(config)
        if not name.endswith(_FORMATS):
            raise CorpusError(f"{name}: unknown kind of file; use one of {', '.join(_FORMATS)}")
        try:
            path = self._local(name)
        except OSError as exc:
            raise CorpusError(f"{name}: cannot be read: {exc.strerror or exc}") from exc
        if name.endswith(".txt"):
            return _Text(name, path, config.txt_documents)
        if name.endswith(".parquet"):
            return _Parquet(name, path, config.text_field)
        return _JsonLines(name, path, config.text_field)

    def _local(self, name: str) -> Path:
        """A seekable, unpacked local copy of the file, or the file itself."""
        path = Path(name)
        if name.startswith("s3://"):
            folder, _, key = name.rpartition("/")
            store = open_store(folder, self._s3)
            path = _scratch() / hashlib.sha256(name.encode()).hexdigest()
            size = store.size(key)
            if size is None:
                raise CorpusError(f"{name}: no such object; correct corpus.files")
            with path.open("wb") as copy:
                for start in range(0, size, _PIECE_BYTES):
                    copy.write(store.get(key, start, min(size, start + _PIECE_BYTES)))
        if name.endswith((".gz", ".zst")):
            packed, path = path, _scratch() / (hashlib.sha256(name.encode()).hexdigest() + ".unpacked")
            with packed.open("rb") as source, path.open("wb") as copy:
                try:
                    if name.endswith(".gz"):
                        with gzip.open(source) as stream:
                            shutil.copyfileobj(stream, copy)
                    else:
                        _import("zstandard", name).ZstdDecompressor().copy_stream(source, copy)
                except (EOFError, gzip.BadGzipFile, ValueError) as exc:
                    raise CorpusError(f"{name}: cannot be unpacked: {exc}") from exc
        return path

    def _fingerprint(self, name: str, places: list[tuple[int, int]]) -> str:
        config = self._config
        if isinstance(config, FilesCorpus):
            with self._local(name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        identity = json.dumps([config.model_dump(mode="json"), len(places)])
        return hashlib.sha256(identity.encode()).hexdigest()


def first_numbers(files: Iterable[CorpusFile]) -> list[int]:
    """The number of each file's first document."""
    numbers, total = [], 0
    for file in files:
        numbers.append(total)
        total += file.documents
    return numbers


class _Numbers:
    """The synthetic corpus: document i is the text "i"."""

    def __init__(self, documents: int) -> None:
        self._documents = documents

    def offsets(self) -> Iterator[tuple[int, int]]:
        return ((i, i + 1) for i in range(self._documents))

    def read(self, start: int, stop: int) -> Iterable[str]:
        return (str(i) for i in range(start, stop))


class _Text:
    def __init__(self, name: str, path: Path, documents: str) -> None:
        self._name, self._path, self._documents = name, path, documents

    def offsets(self) -> Iterator[tuple[int, int]]:
        start = position = 0
        with self._path.open("rb") as file:
            for line in file:
                position += len(line)
                ends = self._documents == "line" or (self._documents == "paragraph" and not line.strip())
                if ends:
                    if self._has_text(file, start, position):
                        yield start, position
                    start = position
            if self._has_text(file, start, position):
                yield start, position

    def read(self, start: int, stop: int) -> Iterable[str]:
        with self._path.open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        pieces = [(a, b) for a, b in self._split(data)]
        return (_decode(data[a:b], self._name, start + a).strip() for a, b in pieces)

    def _split(self, data: bytes) -> Iterator[tuple[int, int]]:
        """The documents of a span, which may hold blank stretches between them."""
        if self._documents == "file":
            yield 0, len(data)
            return
        start = position = 0
        for line in data.splitlines(keepends=True):
            position += len(line)
            if self._documents == "line" or not line.strip():
                if data[start:position].strip():
                    yield start, position
                start = position
        if data[start:].strip():
            yield start, len(data)

    @staticmethod
    def _has_text(file: Any, start: int, stop: int) -> bool:
        here = file.tell()
        file.seek(start)
        found = bool(file.read(stop - start).strip())
        file.seek(here)
        return found


class _JsonLines:
    def __init__(self, name: str, path: Path, field: str) -> None:
        self._name, self._path, self._field = name, path, field

    def offsets(self) -> Iterator[tuple[int, int]]:
        position = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip() and self._text(line, f"{self._name}:{number}"):
                    yield position, position + len(line)
                position += len(line)

    def read(self, start: int, stop: int) -> Iterable[str]:
        with self._path.open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        for line in data.splitlines():
            text = self._text(line, self._name) if line.strip() else ""
            if text:
                yield text

    def _text(self, line: bytes, place: str) -> str:
        try:
            record = json.loads(line)
        except ValueError as exc:
            raise CorpusError(f"{place}: not valid JSON: {exc}") from exc
        if not isinstance(record, dict) or not isinstance(record.get(self._field), str):
            keys = f"it has {', '.join(record)}" if isinstance(record, dict) else "it is no object"
            raise CorpusError(f"{place}: no text under {self._field!r} ({keys}); set corpus.text_field")
        return str(record[self._field]).strip()


class _Parquet:
    def __init__(self, name: str, path: Path, field: str) -> None:
        parquet = _import("pyarrow.parquet", name)
        try:
            self._file = parquet.ParquetFile(path)
        except (OSError, ValueError) as exc:
            raise CorpusError(f"{name}: not a parquet file: {exc}") from exc
        self._name, self._field = name, field
        if field not in self._file.schema_arrow.names:
            raise CorpusError(
                f"{name}: no column {field!r} (it has {', '.join(self._file.schema_arrow.names)}); "
                f"set corpus.text_field"
            )
        groups = self._file.metadata.num_row_groups
        self._starts = [0]
        for group in range(groups):
            self._starts.append(self._starts[-1] + self._file.metadata.row_group(group).num_rows)
        self._group = cache(self._read_group)

    def offsets(self) -> Iterator[tuple[int, int]]:
        return ((i, i + 1) for i in range(self._starts[-1]))

    def read(self, start: int, stop: int) -> Iterable[str]:
        for row in range(start, stop):
            group = bisect.bisect_right(self._starts, row) - 1
            yield str(self._group(group)[row - self._starts[group]].as_py() or "").strip()

    def _read_group(self, group: int) -> Any:
        return self._file.read_row_group(group, columns=[self._field]).column(0)


class _Dataset:
    def __init__(self, config: DatasetCorpus) -> None:
        datasets = _import("datasets", config.name)
        try:
            self._rows = datasets.load_dataset(
                config.name, config.subset, split=config.split, revision=config.revision
            )
        except Exception as exc:  # `datasets` raises dozens of types; all mean the same here
            raise CorpusError(f"corpus.name {config.name}: cannot be loaded: {exc}".splitlines()[0]) from exc
        if config.text_field not in self._rows.column_names:
            raise CorpusError(
                f"corpus.text_field {config.text_field!r}: {config.name} has {', '.join(self._rows.column_names)}"
            )
        self._field = config.text_field

    def offsets(self) -> Iterator[tuple[int, int]]:
        return ((i, i + 1) for i in range(len(self._rows)))

    def read(self, start: int, stop: int) -> Iterable[str]:
        return (str(self._rows[row][self._field] or "").strip() for row in range(start, stop))


def _decode(data: bytes, name: str, position: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise CorpusError(f"{name}: byte {position + exc.start} is not UTF-8; convert the file") from exc


@cache
def _scratch() -> Path:
    """A folder that goes away with the process."""
    folder = tempfile.TemporaryDirectory(prefix="dist_sae-")
    _KEPT.append(folder)
    return Path(folder.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def _import(module: str, name: str) -> Any:
    import importlib  # noqa: PLC0415

    try:
        return importlib.import_module(module)
    except ImportError as exc:
        raise CorpusError(
            f"{name}: reading it needs {module.partition('.')[0]}; pip install 'dist-sae[text]'"
        ) from exc
