"""Documents: where they are, and how to read any of them without reading the rest.

A corpus is a list of files; a document is addressed by a `Span` of neighbouring documents in
one file. Compressed, parquet and remote files are unpacked once per process into a scratch
folder, so that every span is one ranged read. A document is a text that is not blank; blank
ones have no number, in any format.
"""

import errno
import gzip
import hashlib
import importlib
import json
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict

from dist_sae.config.data import CorpusConfig, DatasetCorpus, FilesCorpus, S3Config, SyntheticCorpus
from dist_sae.errors import CorpusError, HubUnavailableError
from dist_sae.hub import is_out_of_reach
from dist_sae.storage import open_store

_PIECE_BYTES = 64 * 2**20  # of a download
_CHUNK_BYTES = 2**20  # of a packed file
_SLICE_ROWS = 1000  # of a table
_FORMATS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_MOST_SPANS = 200_000  # keeps plan.json small; neighbours travel together in larger corpora


class CorpusFile(BaseModel):
    """One file of the corpus, as it was when the plan was made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    documents: int
    fingerprint: str
    """sha256 of its unpacked bytes, or of what identifies it."""


class Span(NamedTuple):
    """Neighbouring documents of one file."""

    file: int
    first: int
    """Number of its first document within the file."""
    count: int  # type: ignore[assignment] # hides tuple.count, which nobody needs here
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


class _Place(NamedTuple):
    """A document and where it is."""

    start: int
    stop: int
    text: str


@runtime_checkable
class _Format(Protocol):
    """How one kind of source is read."""

    def documents(self, start: int = 0, stop: int | None = None) -> Iterator[_Place]:
        """The documents that lie in `[start, stop)`: texts without space around, never empty."""
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
        # one of each for every file: opened, unpacked and hashed once
        self._format = cache(self._open)
        self._local = cache(self._unpack)
        self._fingerprint = cache(self._hash)
        self._scratch = cache(self._make_scratch)

    def index(self) -> CorpusIndex:
        """Read everything once: count, check and fingerprint it.

        Raises:
            CorpusError: A file is missing or unreadable, or there is no text at all.
        """
        offsets: list[list[tuple[int, int]]] = []
        files: list[CorpusFile] = []
        for name in self._names():
            places = [(start, stop) for start, stop, _ in self._format(name).documents()]
            offsets.append(places)
            files.append(
                CorpusFile(name=name, documents=len(places), fingerprint=self._fingerprint(name))
            )
        total = sum(file.documents for file in files)
        if total == 0:
            names = ", ".join(file.name for file in files)
            raise CorpusError(f"corpus: no documents in {names}; give files with text")
        per_span = -(-total // _MOST_SPANS)
        spans = [
            Span(number, first, len(group), group[0][0], group[-1][1])
            for number, places in enumerate(offsets)
            for first in range(0, len(places), per_span)
            if (group := places[first : first + per_span])
        ]
        return CorpusIndex(tuple(files), spans)

    def read(self, files: tuple[CorpusFile, ...], spans: Iterable[Span]) -> Iterator[Document]:
        """The documents of `spans`, numbered over the whole corpus in the order of `files`.

        Raises:
            CorpusError: A file is not what it was when it was indexed.
        """
        base = first_numbers(files)
        for span in spans:
            file = files[span.file]
            if self._fingerprint(file.name) != file.fingerprint:
                raise CorpusError(
                    f"{file.name}: changed since the plan was made; "
                    f"restore it or start a new activation set"
                )
            places = self._format(file.name).documents(span.start, span.stop)
            for number, place in enumerate(places, start=base[span.file] + span.first):
                yield Document(number, place.text)

    def _names(self) -> list[str]:
        config = self._config
        if isinstance(config, SyntheticCorpus):
            return ["synthetic"]
        if isinstance(config, DatasetCorpus):
            return [config.name]
        names: list[str] = []
        for pattern in config.files:
            if pattern.startswith("s3://"):
                names.append(pattern)
                continue
            matches = [pattern] if Path(pattern).exists() else sorted(glob(pattern, recursive=True))
            if not matches:
                raise CorpusError(f"{pattern}: no such file; correct corpus.files")
            names += [str(Path(match).absolute()) for match in matches]
        return list(dict.fromkeys(names))  # a file that two patterns match is read once

    def _open(self, name: str) -> _Format:
        config = self._config
        if isinstance(config, SyntheticCorpus):
            return _Numbers(config.documents)
        if isinstance(config, DatasetCorpus):
            return _Dataset(config)
        if name.endswith(".txt"):
            return _Text(name, self._local(name), config.txt_documents)
        return _JsonLines(name, self._local(name), config.text_field)

    def _unpack(self, name: str) -> Path:
        """The file, or a local copy of it, as plain text or JSON lines."""
        if not name.endswith(_FORMATS):
            raise CorpusError(f"{name}: unknown kind of file; use one of {', '.join(_FORMATS)}")
        with _errors(name):
            path = self._download(name) if name.startswith("s3://") else Path(name)
            if name.endswith((".txt", ".jsonl")):
                return path
            unpacked = self._scratch() / (_digest(name) + ".unpacked")
            with path.open("rb") as source, unpacked.open("wb") as copy:
                if name.endswith(".gz"):
                    _unpack_gzip(source, copy, name)
                elif name.endswith(".zst"):
                    _unpack_zstandard(source, copy, name)
                else:
                    assert isinstance(self._config, FilesCorpus)
                    _unpack_parquet(source, copy, name, self._config.text_field)
            return unpacked

    def _download(self, name: str) -> Path:
        folder, _, key = name.rpartition("/")
        store = open_store(folder, self._s3)
        size = store.size(key)
        if size is None:
            raise CorpusError(f"{name}: no such object; correct corpus.files")
        path = self._scratch() / _digest(name)
        with path.open("wb") as copy:
            for start in range(0, size, _PIECE_BYTES):
                copy.write(store.get(key, start, min(size, start + _PIECE_BYTES)))
        return path

    def _make_scratch(self) -> Path:
        """A folder that goes away with this object."""
        folder = tempfile.mkdtemp(prefix="dist_sae-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return Path(folder)

    def _hash(self, name: str) -> str:
        if not isinstance(self._config, FilesCorpus):  # the name and the revision are all we know
            return _digest(self._config.model_dump_json())
        with _errors(name), self._local(name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


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

    def documents(self, start: int = 0, stop: int | None = None) -> Iterator[_Place]:
        stop = self._documents if stop is None else stop
        return (_Place(i, i + 1, str(i)) for i in range(start, stop))


class _Text:
    """Plain text; a document is a line, a paragraph (up to a blank line) or the file."""

    def __init__(self, name: str, path: Path, unit: Literal["paragraph", "line", "file"]) -> None:
        self._name, self._path, self._unit = name, path, unit

    def documents(self, start: int = 0, stop: int | None = None) -> Iterator[_Place]:
        first, lines = start, list[str]()
        for line in _lines(self._name, self._path, start, stop):
            lines.append(line.text)
            if self._unit == "line" or (self._unit == "paragraph" and not line.text.strip()):
                yield from _place(first, line.stop, "".join(lines))
                first, lines = line.stop, []
            last = line.stop
        if lines:
            yield from _place(first, last, "".join(lines))


class _JsonLines:
    """One JSON object a line."""

    def __init__(self, name: str, path: Path, field: str) -> None:
        self._name, self._path, self._field = name, path, field

    def documents(self, start: int = 0, stop: int | None = None) -> Iterator[_Place]:
        for number, line in enumerate(_lines(self._name, self._path, start, stop), start=1):
            if line.text.strip():
                yield from _place(
                    line.start, line.stop, self._text(line.text, f"{self._name}:{number}")
                )

    def _text(self, line: str, place: str) -> str:
        try:
            record = json.loads(line)
        except ValueError as exc:
            raise CorpusError(f"{place}: not valid JSON: {exc}") from exc
        if not isinstance(record, dict):
            raise CorpusError(f"{place}: not a JSON object; write one object a line")
        if self._field not in record:
            raise CorpusError(_no_field(place, self._field, record))
        return _checked(record[self._field], self._field, place)


class _Dataset:
    """A data set of the hub."""

    def __init__(self, config: DatasetCorpus) -> None:
        datasets = _import("datasets", config.name)
        try:
            self._rows = datasets.load_dataset(
                config.name, config.subset, split=config.split, revision=config.revision
            )
        except Exception as exc:  # `datasets` raises dozens of types; all mean the same here
            reason = " ".join(str(exc).split())
            kind = HubUnavailableError if is_out_of_reach(exc) else CorpusError
            raise kind(f"corpus.name {config.name}: cannot be loaded: {reason}") from exc
        if config.text_field not in self._rows.column_names:
            raise CorpusError(_no_field(config.name, config.text_field, self._rows.column_names))
        self._name, self._field = config.name, config.text_field

    def documents(self, start: int = 0, stop: int | None = None) -> Iterator[_Place]:
        stop = len(self._rows) if stop is None else stop
        for first in range(start, stop, _SLICE_ROWS):
            values = self._rows[first : min(stop, first + _SLICE_ROWS)][self._field]
            for row, value in enumerate(values, start=first):
                text = _checked(value, self._field, f"{self._name}: row {row}")
                yield from _place(row, row + 1, text)


class _Line(NamedTuple):
    start: int
    stop: int
    text: str


def _lines(name: str, path: Path, start: int, stop: int | None) -> Iterator[_Line]:
    """The lines of a file in `[start, stop)`. A line ends with LF; CR alone ends none."""
    position = start
    with _errors(name), path.open("rb") as file:
        file.seek(start)
        for number, line in enumerate(file, start=1):
            if stop is not None and position >= stop:
                return
            try:
                text = line.decode("utf-8-sig" if position == 0 else "utf-8")
            except UnicodeDecodeError as exc:
                raise CorpusError(f"{name}:{number}: not UTF-8; convert the file") from exc
            yield _Line(position, position + len(line), text)
            position += len(line)


def _place(start: int, stop: int, text: str) -> Iterator[_Place]:
    """A document, unless it is blank."""
    if stripped := text.strip():
        yield _Place(start, stop, stripped)


def _checked(value: Any, field: str, place: str) -> str:
    """The text of a record; null is as good as an empty text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise CorpusError(f"{place}: {field!r} holds no text but a {kind}; set corpus.text_field")
    try:
        value.encode()
    except UnicodeEncodeError as exc:
        raise CorpusError(f"{place}: half a surrogate pair, which is no text; repair it") from exc
    return value


def _no_field(place: str, field: str, known: Iterable[str]) -> str:
    return f"{place}: no {field!r} (it has {', '.join(known)}); set corpus.text_field"


def _unpack_gzip(source: BinaryIO, copy: BinaryIO, name: str) -> None:
    try:
        with gzip.open(source) as stream:
            shutil.copyfileobj(stream, copy)
    except (EOFError, gzip.BadGzipFile, zlib.error) as exc:
        raise CorpusError(f"{name}: cannot be unpacked: {exc}; get it again") from exc


def _unpack_zstandard(source: BinaryIO, copy: BinaryIO, name: str) -> None:
    """By hand: the library's own copying takes a file that was cut short for a whole one."""
    zstandard = _import("zstandard", name)
    frame = None
    try:
        while packed := source.read(_CHUNK_BYTES):
            while packed:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                copy.write(frame.decompress(packed))
                packed = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as exc:
        raise CorpusError(f"{name}: cannot be unpacked: {exc}; get it again") from exc
    if frame is not None:
        raise CorpusError(f"{name}: cannot be unpacked: it is cut short; get it again")


def _unpack_parquet(source: BinaryIO, copy: BinaryIO, name: str, field: str) -> None:
    """As JSON lines: any document is one ranged read then, not one row group."""
    parquet = _import("pyarrow.parquet", name)
    try:
        file = parquet.ParquetFile(source)
        if field not in file.schema_arrow.names:
            raise CorpusError(_no_field(name, field, file.schema_arrow.names))
        row = 0
        for batch in file.iter_batches(_SLICE_ROWS, columns=[field]):
            for value in batch.column(0).to_pylist():
                text = _checked(value, field, f"{name}: row {row}")
                copy.write(json.dumps({field: text}).encode() + b"\n")
                row += 1
    except ValueError as exc:  # pyarrow's errors, and text that is not UTF-8
        reason = " ".join(str(exc).split())
        raise CorpusError(f"{name}: not a sound parquet file: {reason}") from exc


@contextmanager
def _errors(name: str) -> Iterator[None]:
    """What the operating system says about a file of the corpus, or about the scratch folder."""
    try:
        yield
    except OSError as exc:
        if exc.errno == errno.ENOSPC:
            raise CorpusError(
                f"{name}: no space to unpack it in {tempfile.gettempdir()}; free some or set TMPDIR"
            ) from exc
        reason = " ".join(str(exc.strerror or exc).split())
        raise CorpusError(f"{name}: cannot be read: {reason}") from exc


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _import(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        package = module.partition(".")[0]
        raise CorpusError(
            f"{name}: reading it needs {package}; pip install 'dist-sae[text]'"
        ) from exc
