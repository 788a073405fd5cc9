"""Readers for each kind of text source, and unpacking of compressed files.

A document is a text that is not blank. In every format, blank texts are skipped in the numbering.
"""

import errno
import gzip
import importlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from dist_sae.config.data import DatasetCorpus
from dist_sae.errors import CorpusError, HubUnavailableError
from dist_sae.hub import causes, is_unavailable

FORMATS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_CHUNK_BYTES = 2**20  # read from a compressed file at a time
SLICE_ROWS = 1000
"""Rows of a table that are read at a time."""
_MOST_NAMED = 20  # most fields that a message names


class LocatedText(NamedTuple):
    """A text and its position in the source."""

    start: int
    stop: int
    text: str


Texts = Callable[[int, int | None], Iterator[LocatedText]]
"""Function (start, stop) that yields the stripped texts of a source in `[start, stop)`. A `stop` of
None is the end of the source; a blank record yields ""."""


def numbers(documents: int, start: int, stop: int | None) -> Iterator[LocatedText]:
    """Yield the texts of the synthetic corpus: document i is the text "i"."""
    return (
        LocatedText(i, i + 1, str(i)) for i in range(start, documents if stop is None else stop)
    )


def plain_text(
    name: str,
    path: Path,
    unit: Literal["paragraph", "line", "file"],
    start: int,
    stop: int | None,
) -> Iterator[LocatedText]:
    """Yield the lines of a plain text, its paragraphs (each up to a blank line) or all of it."""
    first, lines = start, list[str]()
    for line in _lines(name, path, start, stop):
        lines.append(line.text)
        if unit == "line" or (unit == "paragraph" and not line.text.strip()):
            yield from _located(first, line.stop, "".join(lines))
            first, lines = line.stop, []
        last = line.stop
    if lines:
        yield from _located(first, last, "".join(lines))


def json_lines(
    name: str, path: Path, field: str, start: int, stop: int | None
) -> Iterator[LocatedText]:
    """Yield the texts of a file with a JSON object on each line."""
    for number, line in enumerate(_lines(name, path, start, stop), start=1):
        if line.text.strip():
            text = _text_of(line.text, field, f"{name}:{number}")
            yield LocatedText(line.start, line.stop, text.strip())


def _text_of(line: str, field: str, place: str) -> str:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as exc:
        raise CorpusError(f"{place}: not valid JSON: {exc}") from exc
    except ValueError:  # an integer with more digits than Python parses
        record = json.loads(line, parse_int=str)
    if not isinstance(record, dict):
        raise CorpusError(f"{place}: not a JSON object; write one object per line")
    if field not in record:
        raise CorpusError(_no_field(place, field, record))
    return _checked(record[field], field, place)


def open_dataset(config: DatasetCorpus) -> Texts:
    """Load a data set from the hub or a local folder, and return a reader of its texts."""
    datasets = _import("datasets", config.name)
    try:
        rows = datasets.load_dataset(
            os.path.expanduser(config.name),
            config.subset,
            split=config.split,
            revision=config.revision,
        )
    except Exception as exc:  # `datasets` raises dozens of types for this
        # the reason is only in the exceptions that caused this one
        reason = ": ".join(dict.fromkeys(" ".join(str(e).split()) for e in causes(exc)))
        kind = HubUnavailableError if is_unavailable(exc) else CorpusError
        raise kind(f"corpus.name {config.name}: cannot be loaded: {reason}") from exc
    if config.text_field not in rows.column_names:
        raise CorpusError(_no_field(config.name, config.text_field, rows.column_names))

    def texts(start: int, stop: int | None) -> Iterator[LocatedText]:
        stop = len(rows) if stop is None else stop
        for first in range(start, stop, SLICE_ROWS):
            values = rows[first : min(stop, first + SLICE_ROWS)][config.text_field]
            for row, value in enumerate(values, start=first):
                text = _checked(value, config.text_field, f"{config.name}: row {row}")
                yield LocatedText(row, row + 1, text.strip())

    return texts


def _lines(name: str, path: Path, start: int, stop: int | None) -> Iterator[LocatedText]:
    """Yield the lines of a file in `[start, stop)`. Only LF ends a line; a lone CR does not."""
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
            yield LocatedText(position, position + len(line), text)
            position += len(line)


def _located(start: int, stop: int, text: str) -> Iterator[LocatedText]:
    """Yield the text as a document, unless it is blank."""
    if stripped := text.strip():
        yield LocatedText(start, stop, stripped)


def _checked(value: Any, field: str, place: str) -> str:
    """Return the text of a record; null counts as empty."""
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise CorpusError(f"{place}: {field!r} is {kind}, not a string; set corpus.text_field")
    return value


def _no_field(place: str, field: str, known: Iterable[str]) -> str:
    names = [name if name.isprintable() else repr(name) for name in known]
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    shown = ", ".join(names[:_MOST_NAMED]) + more
    return f"{place}: no {field!r} (it has {shown}); set corpus.text_field"


def unpack(name: str, path: Path, unpacked: Path, field: str) -> None:
    """Write an uncompressed copy of a file; a parquet table is written as JSON lines.

    Raises:
        CorpusError: The file is damaged, or has no column `field`.
    """
    if not path.stat().st_size:  # gzip and Zstandard would unpack it to an empty text
        raise CorpusError(f"{name}: cannot be unpacked: it is empty; download it again")
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
        raise CorpusError(f"{name}: cannot be unpacked: {exc}; download it again") from exc


def _unpack_zstandard(source: BinaryIO, copy: BinaryIO, name: str) -> None:
    """Decompress frame by frame, because the library's copy function misses a truncated file."""
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
        raise CorpusError(f"{name}: cannot be unpacked: {exc}; download it again") from exc
    if frame is not None:
        raise CorpusError(f"{name}: cannot be unpacked: it is truncated; download it again")


def _unpack_parquet(source: BinaryIO, copy: BinaryIO, name: str, field: str) -> None:
    """Write a table as JSON lines, so that reading one document does not read a row group."""
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
    except ValueError as exc:  # includes pyarrow's errors and text that is not UTF-8
        reason = " ".join(str(exc).split())
        raise CorpusError(f"{name}: not a valid parquet file: {reason}") from exc


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
