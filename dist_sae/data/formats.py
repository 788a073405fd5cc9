"""Reading and unpacking each kind of text source, text by text.

A document is a text that is not blank; blank texts have no number, in any format.
"""

import errno
import gzip
import importlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol, runtime_checkable

from dist_sae.config.data import DatasetCorpus
from dist_sae.errors import CorpusError, HubUnavailableError
from dist_sae.hub import causes, is_out_of_reach

FORMATS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_CHUNK_BYTES = 2**20  # of a packed file
SLICE_ROWS = 1000
"""Rows of a table that are read at a time."""
_MOST_NAMED = 20  # fields in a message


class Place(NamedTuple):
    """A text and its position in the source."""

    start: int
    stop: int
    text: str


@runtime_checkable
class Format(Protocol):
    """Reader of one kind of source."""

    def texts(self, start: int = 0, stop: int | None = None) -> Iterator[Place]:
        """Yield the stripped texts in `[start, stop)`; "" for a blank record."""
        ...


class Numbers:
    """The synthetic corpus: document i is the text "i"."""

    def __init__(self, documents: int) -> None:
        self._documents = documents

    def texts(self, start: int = 0, stop: int | None = None) -> Iterator[Place]:
        stop = self._documents if stop is None else stop
        return (Place(i, i + 1, str(i)) for i in range(start, stop))


class PlainText:
    """Plain text; a document is a line, a paragraph (up to a blank line) or the file."""

    def __init__(self, name: str, path: Path, unit: Literal["paragraph", "line", "file"]) -> None:
        self._name, self._path, self._unit = name, path, unit

    def texts(self, start: int = 0, stop: int | None = None) -> Iterator[Place]:
        first, lines = start, list[str]()
        for line in _lines(self._name, self._path, start, stop):
            lines.append(line.text)
            if self._unit == "line" or (self._unit == "paragraph" and not line.text.strip()):
                yield from _place(first, line.stop, "".join(lines))
                first, lines = line.stop, []
            last = line.stop
        if lines:
            yield from _place(first, last, "".join(lines))


class JsonLines:
    """JSON lines: one object per line."""

    def __init__(self, name: str, path: Path, field: str) -> None:
        self._name, self._path, self._field = name, path, field

    def texts(self, start: int = 0, stop: int | None = None) -> Iterator[Place]:
        for number, line in enumerate(_lines(self._name, self._path, start, stop), start=1):
            if line.text.strip():
                text = self._text(line.text, f"{self._name}:{number}")
                yield Place(line.start, line.stop, text.strip())

    def _text(self, line: str, place: str) -> str:
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as exc:
            raise CorpusError(f"{place}: not valid JSON: {exc}") from exc
        except ValueError:  # a number of more digits than Python would read
            record = json.loads(line, parse_int=str)
        if not isinstance(record, dict):
            raise CorpusError(f"{place}: not a JSON object; write one object a line")
        if self._field not in record:
            raise CorpusError(_no_field(place, self._field, record))
        return _checked(record[self._field], self._field, place)


class DatasetRows:
    """A data set on the hub."""

    def __init__(self, config: DatasetCorpus) -> None:
        datasets = _import("datasets", config.name)
        try:
            self._rows = datasets.load_dataset(
                os.path.expanduser(config.name),
                config.subset,
                split=config.split,
                revision=config.revision,
            )
        except Exception as exc:  # `datasets` raises dozens of types; all mean the same here
            # that it failed, and why: the library keeps the reason to itself
            reason = ": ".join(dict.fromkeys(" ".join(str(e).split()) for e in causes(exc)))
            kind = HubUnavailableError if is_out_of_reach(exc) else CorpusError
            raise kind(f"corpus.name {config.name}: cannot be loaded: {reason}") from exc
        if config.text_field not in self._rows.column_names:
            raise CorpusError(_no_field(config.name, config.text_field, self._rows.column_names))
        self._name, self._field = config.name, config.text_field

    def texts(self, start: int = 0, stop: int | None = None) -> Iterator[Place]:
        stop = len(self._rows) if stop is None else stop
        for first in range(start, stop, SLICE_ROWS):
            values = self._rows[first : min(stop, first + SLICE_ROWS)][self._field]
            for row, value in enumerate(values, start=first):
                text = _checked(value, self._field, f"{self._name}: row {row}")
                yield Place(row, row + 1, text.strip())


class _Line(NamedTuple):
    start: int
    stop: int
    text: str


def _lines(name: str, path: Path, start: int, stop: int | None) -> Iterator[_Line]:
    """Yield the lines of a file in `[start, stop)`. A line ends with LF; CR alone ends none."""
    position = start
    with os_errors(name), path.open("rb") as file:
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


def _place(start: int, stop: int, text: str) -> Iterator[Place]:
    """A document, unless it is blank."""
    if stripped := text.strip():
        yield Place(start, stop, stripped)


def _checked(value: Any, field: str, place: str) -> str:
    """Return the text of a record; null counts as empty."""
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise CorpusError(f"{place}: {field!r} holds no text but a {kind}; set corpus.text_field")
    return value


def _no_field(place: str, field: str, known: Iterable[str]) -> str:
    names = [name if name.isprintable() else repr(name) for name in known]
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    there = ", ".join(names[:_MOST_NAMED]) + more
    return f"{place}: no {field!r} (it has {there}); set corpus.text_field"


def unpack(name: str, path: Path, unpacked: Path, field: str) -> None:
    """Write a plain copy of a compressed file, or of a table as JSON lines.

    Raises:
        CorpusError: The file is damaged, or has no column `field`.
    """
    if not path.stat().st_size:  # which gzip and Zstandard take for an empty text
        raise CorpusError(f"{name}: cannot be unpacked: it is empty; get it again")
    with path.open("rb") as source, unpacked.open("wb") as copy:
        if name.endswith(".gz"):
            _unpack_gzip(source, copy, name)
        elif name.endswith(".zst"):
            _unpack_zstandard(source, copy, name)
        else:
            _unpack_parquet(source, copy, name, field)


def _unpack_gzip(source: BinaryIO, copy: BinaryIO, name: str) -> None:
    try:
        with gzip.open(source) as stream:
            shutil.copyfileobj(stream, copy)
    except (EOFError, gzip.BadGzipFile, zlib.error) as exc:
        raise CorpusError(f"{name}: cannot be unpacked: {exc}; get it again") from exc


def _unpack_zstandard(source: BinaryIO, copy: BinaryIO, name: str) -> None:
    """Decompress by hand: the library's own copying does not notice a truncated file."""
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
    """Write a table as JSON lines, so that a document is one ranged read, not one row group."""
    parquet = _import("pyarrow.parquet", name)
    try:
        file = parquet.ParquetFile(source)
        if field not in file.schema_arrow.names:
            raise CorpusError(_no_field(name, field, file.schema_arrow.names))
        row = 0
        for batch in file.iter_batches(SLICE_ROWS, columns=[field]):
            for value in batch.column(0).to_pylist():
                text = _checked(value, field, f"{name}: row {row}")
                copy.write(json.dumps({field: text}).encode() + b"\n")
                row += 1
    except ValueError as exc:  # pyarrow's errors, and text that is not UTF-8
        reason = " ".join(str(exc).split())
        raise CorpusError(f"{name}: not a sound parquet file: {reason}") from exc


@contextmanager
def os_errors(name: str) -> Iterator[None]:
    """Turn operating-system errors on a corpus file or the scratch folder into `CorpusError`."""
    try:
        yield
    except OSError as exc:
        if exc.errno == errno.ENOSPC:
            raise CorpusError(
                f"{name}: no space to unpack it in {tempfile.gettempdir()}; free some or set TMPDIR"
            ) from exc
        reason = " ".join(str(exc.strerror or exc).split())
        raise CorpusError(f"{name}: cannot be read: {reason}") from exc


def _import(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        package = module.partition(".")[0]
        raise CorpusError(
            f"{name}: reading it needs {package}; run pip install '.[text]' in the repository"
        ) from exc
