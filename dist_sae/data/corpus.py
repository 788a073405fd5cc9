"""Documents: where they are, and how to read any of them without reading the rest.

A corpus is a list of files; a document is addressed by a `Span` of neighbouring documents in
one file. Compressed, parquet and remote files are unpacked once per process into a scratch
folder, so that every span is one ranged read.

Text is known by its content. A planned file is looked for among the run's files by its checksum,
and documents that are read together are compared with the checksum that the plan has of them.
"""

import hashlib
import logging
import os
import shutil
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from glob import glob
from itertools import accumulate, chain
from pathlib import Path
from typing import NamedTuple, SupportsIndex

import xxhash
from pydantic import BaseModel, ConfigDict, Field

from dist_sae.config.data import CorpusConfig, DatasetCorpus, FilesCorpus, S3Config, SyntheticCorpus
from dist_sae.data.formats import (
    FORMATS,
    DatasetRows,
    Format,
    JsonLines,
    Numbers,
    Place,
    PlainText,
    os_errors,
    unpack,
)
from dist_sae.errors import CorpusError
from dist_sae.hub import dataset_commit
from dist_sae.storage import ObjectStore, open_store

logger = logging.getLogger(__name__)

_PIECE_BYTES = 64 * 2**20  # of a download
_SAID_EVERY = 1000  # documents
_MOST_SPANS = 200_000  # keeps plan.json small; neighbours travel together in larger corpora
_DIGEST_BYTES = 16  # of a document


class CorpusFile(BaseModel):
    """One file of the corpus, as it was when the plan was made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    documents: int
    fingerprint: str
    """sha256 of its unpacked bytes; for a data set, of the checksums of its documents."""
    bytes: int | None = Field(None, exclude_if=lambda size: size is None)
    """Size of the file as it lies; None for what is no file, and in plans of earlier versions."""


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
    text_bytes: list[int]
    """Of each span's documents, as UTF-8; what no encoding can write gives no rows and has none."""
    digests: list[bytes] | None = None
    """The checksums of each span's documents, one after the other; None where there is no text."""
    commit: str | None = None
    """Of a data set on the hub."""

    def checksums(self, units: Iterable[Iterable[SupportsIndex]]) -> tuple[str, ...] | None:
        """Checksum of the documents of each unit, whose spans are named by their place here."""
        if self.digests is None:
            return None
        digests = self.digests
        return tuple(_combined(digests[span] for span in unit) for unit in units)


class Corpus:
    """Reads documents of the corpus that a run names.

    Args:
        config: The corpus section of the run.
        s3: How to reach `s3://` files.
    """

    def __init__(self, config: CorpusConfig, s3: S3Config) -> None:
        self._config = config
        # one of each for every file
        self._names = cache(self._find_names)
        self._named = cache(lambda: dict.fromkeys(self._names()))
        self._namesakes = cache(self._find_namesakes)
        self._planned = _Planned.of(())
        self._format = cache(self._open)
        self._local = cache(self._unpack)
        self._hash = cache(_hash)  # of a path in a state
        self._size = cache(self._measure)
        self._bucket = cache(lambda bucket: open_store(f"s3://{bucket}", s3))
        self._scratch = cache(self._make_scratch)

    def index(self, said: Callable[[int], None] = lambda _: None) -> CorpusIndex:
        """Read everything once: count, check and fingerprint it.

        Args:
            said: Is told now and then of how many documents have been read.

        Raises:
            CorpusError: A file is missing or unreadable, or there is no text at all.
        """
        commit = self._pin()
        found = [_Found() for _ in self._names()]
        files = list[CorpusFile]()
        total = 0
        for name, places in zip(self._names(), found, strict=True):
            files.append(self._index(name, places, said, total))
            total += files[-1].documents
        if total == 0:
            names = ", ".join(file.name for file in files)
            raise CorpusError(f"corpus: no documents in {names}; give files with text")
        per_span = -(-total // _MOST_SPANS)
        spans, text_bytes, digests = [], list[int](), list[bytes]()
        for number, places in enumerate(found):
            for first in range(0, len(places.starts), per_span):
                last = min(first + per_span, len(places.starts))
                start, stop = places.starts[first], places.stops[last - 1]
                spans.append(Span(number, first, last - first, start, stop))
                text_bytes.append(sum(places.text_bytes[first:last]))
                digests.append(bytes(places.digests[first * _DIGEST_BYTES : last * _DIGEST_BYTES]))
        has_text = not isinstance(self._config, SyntheticCorpus)
        return CorpusIndex(tuple(files), spans, text_bytes, digests if has_text else None, commit)

    def read(
        self, files: Sequence[CorpusFile], spans: Iterable[Span], checksum: str | None = None
    ) -> list[Document]:
        """The documents of `spans`, numbered over the whole corpus in the order of `files`.

        Args:
            files: As they were planned.
            spans: Of these files.
            checksum: Of the documents, as they were planned; None where the plan has none. Then a
                change is noticed by the files alone, and not in a data set.

        Raises:
            CorpusError: The text is not what it was when it was indexed.
        """
        spans = list(spans)
        if files is not self._planned.files:
            self._planned = _Planned.of(files)
        base = self._planned.first_numbers
        names = self._present(files, spans)
        try:
            documents = [
                Document(number, place.text)
                for span in spans
                for number, place in enumerate(
                    filter(_has_text, self._format(names[span.file]).texts(span.start, span.stop)),
                    start=base[span.file] + span.first,
                )
            ]
            if checksum not in (None, _combined(_digest(document.text) for document in documents)):
                raise _changed(", ".join(names.values()))
        except CorpusError:
            self._hash.cache_clear()  # a file may be another although its size and time are not
            self._present(files, spans)  # says which file it is
            raise
        self._present(files, spans)  # written anew while it was read
        return documents

    def holds(self, files: Sequence[CorpusFile], commit: str | None = None) -> bool:
        """Whether the corpus is these files, in any order and wherever it lies now.

        Sizes that agree suffice: `read` looks closer; on the hub the commits of one name tell. So
        programs that need no text read none.

        Args:
            files: As they were planned.
            commit: Of the data set on the hub that they are, where that is known.

        Raises:
            CorpusError: Text is missing or unreadable.
        """
        if isinstance(self._config, FilesCorpus):
            names = self._names()
            if {*names} == {file.name for file in files}:
                return True
            if sorted(map(self._size, names)) == sorted(file.bytes or -1 for file in files):
                return True
            fingerprints = [self._fingerprint(name) for name in names]
        else:
            here = self._pin() if commit else None
            same_name = self._names() == [file.name for file in files]
            if here and (here == commit or same_name):
                return here == commit
            fingerprints = [file.fingerprint for file in self.index().files]
        return sorted(fingerprints) == sorted(file.fingerprint for file in files)

    def _pin(self) -> str | None:
        """Stay with what a data set on the hub is now; returns its commit if the hub tells."""
        config = self._config
        if not isinstance(config, DatasetCorpus) or Path(os.path.expanduser(config.name)).exists():
            return None
        commit = dataset_commit(config.name, config.revision)
        if commit is None:
            logger.warning(
                "corpus.name %s: the hub does not tell its commit; "
                "a later one will be refused where its text is another",
                config.name,
            )
            return None
        self._config = config.model_copy(update={"revision": commit})
        return commit

    def _index(
        self, name: str, found: "_Found", said: Callable[[int], None], earlier: int
    ) -> CorpusFile:
        """Read one file through; what is found is added to `found`."""
        is_file = isinstance(self._config, FilesCorpus)
        before = self._state(name) if is_file else None
        blank = refused = 0
        for start, stop, text in self._format(name).texts():
            if not text:
                blank += 1
                continue
            if len(found.starts) % _SAID_EVERY == 0:
                said(earlier + len(found.starts))
            found.starts.append(start)
            found.stops.append(stop)
            encodable = is_encodable(text)
            found.text_bytes.append(len(text.encode()) if encodable else 0)
            found.digests += _digest(text)
            refused += not encodable
        if blank or not found.starts:
            logger.log(
                logging.INFO if found.starts else logging.WARNING,
                "%s: %d documents; %d records without text are none",
                name,
                len(found.starts),
                blank,
            )
        if refused:
            logger.warning(
                "%s: %d of %d documents have half a surrogate pair, which no tokenizer takes: "
                "they are left out, and counted as refused",
                name,
                refused,
                len(found.starts),
            )
        match self._config:
            case FilesCorpus():
                fingerprint = self._fingerprint(name)
            case DatasetCorpus():
                fingerprint = hashlib.sha256(found.digests).hexdigest()
            case SyntheticCorpus():
                content = self._config.model_dump_json().encode()
                fingerprint = hashlib.sha256(content).hexdigest()
        if is_file and self._state(name) != before:
            raise CorpusError(f"{name}: changed while it was read; plan again when it is complete")
        return CorpusFile(
            name=name,
            documents=len(found.starts),
            fingerprint=fingerprint,
            bytes=self._size(name) if is_file else None,
        )

    def _present(self, files: Sequence[CorpusFile], spans: Iterable[Span]) -> dict[int, str]:
        """Where the files of `spans` lie now, by their number."""
        return {
            number: self._place(files[number]) for number in sorted({span.file for span in spans})
        }

    def _place(self, file: CorpusFile) -> str:
        """Where a planned file lies now: a file of the run, or where it was, with its content."""
        if not isinstance(self._config, FilesCorpus):
            return self._names()[0]
        names: Mapping[str, None] = {}
        problem: CorpusError | None = None
        try:
            names = self._named()
        except CorpusError as exc:  # a path relative to another folder: the plan has it whole
            problem = exc
        for name in self._candidates(file, names):
            try:
                if self._fingerprint(name) == file.fingerprint:
                    return name
            except CorpusError as exc:
                if name in names:
                    problem = problem or exc
        if file.name in names:
            raise problem or _changed(file.name)
        raise problem or CorpusError(
            f"corpus.files: none is the file that was {file.name} when the plan was made; "
            f"name it, or start a new activation set"
        )

    def _candidates(self, file: CorpusFile, names: Mapping[str, None]) -> Iterator[str]:
        """Where a planned file may lie, likely places first."""
        if file.name in names:
            yield file.name
        namesakes = self._namesakes().get(Path(file.name).name, {}) if names else {}
        for name in chain(namesakes, (name for name in names if name not in namesakes)):
            # the plan's other files are taken to be there still: none is fetched to look for this
            other = name in self._planned.names and file.bytes not in (None, self._size(name))
            if name != file.name and not other:
                yield name
        if file.name not in names and not file.name.startswith("s3://"):
            yield file.name

    def _find_names(self) -> list[str]:
        config = self._config
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
        return list(dict.fromkeys(names))  # a file that two patterns match is read once

    def _find_namesakes(self) -> dict[str, dict[str, None]]:
        """The files by the last part of their names."""
        found: dict[str, dict[str, None]] = {}
        for name in self._names():
            found.setdefault(Path(name).name, {})[name] = None
        return found

    def _open(self, name: str) -> Format:
        config = self._config
        if isinstance(config, SyntheticCorpus):
            return Numbers(config.documents)
        if isinstance(config, DatasetCorpus):
            return DatasetRows(config)
        if name.endswith(".txt"):
            return PlainText(name, self._local(name), config.txt_documents)
        return JsonLines(name, self._local(name), config.text_field)

    def _unpack(self, name: str) -> Path:
        """The file, or a local copy of it, as plain text or JSON lines."""
        assert isinstance(self._config, FilesCorpus)
        if not name.endswith(FORMATS):
            raise CorpusError(f"{name}: unknown kind of file; use one of {', '.join(FORMATS)}")
        with os_errors(name):
            path = self._download(name) if name.startswith("s3://") else Path(name)
            if name.endswith((".txt", ".jsonl")):
                return path
            unpacked = self._scratch() / f"{_hex(name)}.unpacked"
            unpack(name, path, unpacked, self._config.text_field)
            return unpacked

    def _download(self, name: str) -> Path:
        store, key = self._object(name)
        size = self._size(name)
        path = self._scratch() / _hex(name)
        with path.open("wb") as copy:
            for start in range(0, size, _PIECE_BYTES):
                copy.write(store.get(key, start, min(size, start + _PIECE_BYTES)))
        return path

    def _measure(self, name: str) -> int:
        """Size of a file as it lies, in bytes."""
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
        """A folder that goes away with this object."""
        folder = tempfile.mkdtemp(prefix="dist_sae-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return Path(folder)

    def _fingerprint(self, name: str) -> str:
        state = self._state(name)
        with os_errors(name):
            return self._hash(self._local(name), state)

    def _state(self, name: str) -> tuple[int, int, int]:
        """Changes when the unpacked file is written anew: inode, size, time in ns."""
        with os_errors(name):
            there = self._local(name).stat()
        return there.st_ino, there.st_size, there.st_mtime_ns


class _Found:
    """Documents of one file: where each begins and ends, and their checksums."""

    def __init__(self) -> None:
        self.starts, self.stops, self.digests = array("q"), array("q"), bytearray()
        self.text_bytes = array("q")


class _Planned(NamedTuple):
    """Planned files with what every read asks of all of them: there may be thousands."""

    files: Sequence[CorpusFile]
    first_numbers: list[int]
    """The number of each file's first document."""
    names: set[str]

    @classmethod
    def of(cls, files: Sequence[CorpusFile]) -> "_Planned":
        ends = accumulate((file.documents for file in files), initial=0)
        return cls(files, list(ends), {file.name for file in files})


def is_encodable(text: str) -> bool:
    """Whether a text is one: JSON can write half a surrogate pair, which stands for nothing."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _has_text(place: Place) -> bool:
    return bool(place.text)


def _changed(name: str) -> CorpusError:
    return CorpusError(
        f"{name}: changed since the plan was made; restore it or start a new activation set"
    )


def _hash(path: Path, _: tuple[int, int, int]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(text: str) -> bytes:
    return xxhash.xxh3_128_digest(text.encode(errors="surrogatepass"))


def _combined(digests: Iterable[bytes]) -> str:
    """Checksum of documents, from the checksum of each."""
    return xxhash.xxh3_128_hexdigest(b"".join(digests))


def _hex(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
