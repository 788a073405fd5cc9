"""Documents of a corpus: indexed once, after which any of them can be read without the rest.

A corpus is a list of files. A `Span` addresses neighboring documents of one file.

Text is identified by its content, not by its path. A planned file is found among the run's files
by its checksum, and the documents of a unit are compared with the checksum in the plan.
"""

import hashlib
import logging
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple, SupportsIndex

import xxhash

from dist_sae.config.data import CorpusConfig, DatasetCorpus, FilesCorpus, S3Config, SyntheticCorpus
from dist_sae.data.corpus_files import CorpusFile, CorpusFiles, changed
from dist_sae.data.formats import LocatedText
from dist_sae.errors import CorpusError

logger = logging.getLogger(__name__)

_PROGRESS_EVERY = 1000  # documents between calls to `on_progress`
MOST_SPANS = 200_000
"""Maximum number of spans, which keeps plan.json small. In a corpus with more documents than this,
a span has several documents."""
_DIGEST_BYTES = 16  # length of a document's checksum


class Span(NamedTuple):
    """Neighboring documents of one file."""

    file: int
    first: int
    """Number of the span's first document within the file."""
    count: int  # type: ignore[assignment] # hides tuple.count, which nobody needs here
    start: int
    """Start of the span: a byte offset in the unpacked file, or a row of a data set."""
    stop: int


class Document(NamedTuple):
    """A text, and the number that identifies it in every row that is produced from it."""

    number: int
    text: str


class CorpusIndex(NamedTuple):
    """Facts about a corpus that a plan needs."""

    files: tuple[CorpusFile, ...]
    spans: list[Span]
    text_bytes: list[int]
    """UTF-8 bytes of each span's documents; a document that cannot be encoded counts as 0."""
    digests: list[bytes] | None = None
    """Concatenated checksums of each span's documents; None if there is no text or it was not
    read."""
    commit: str | None = None
    """Commit of a data set on the hub."""

    def checksums(self, units: Iterable[Iterable[SupportsIndex]]) -> tuple[str, ...] | None:
        """Compute the checksum of each unit's documents, from the indices of its spans."""
        if self.digests is None:
            return None
        digests = self.digests
        return tuple(_combined(digests[span] for span in unit) for unit in units)


class Corpus:
    """Reader of the documents of a run's corpus.

    Args:
        s3: Settings for reading `s3://` files.
    """

    def __init__(self, config: CorpusConfig, s3: S3Config) -> None:
        self._files = CorpusFiles(config, s3)
        self._planned = _Planned.of(())

    def index(self, on_progress: Callable[[int], None] = lambda _: None) -> CorpusIndex:
        """Read the whole corpus once to count, check and fingerprint its documents.

        Args:
            on_progress: Progress callback for the number of documents read so far.

        Raises:
            CorpusError: A file is missing or unreadable, or there is no text at all.
        """
        commit = self._files.pin()
        found = [_Found() for _ in self._files.names()]
        files = list[CorpusFile]()
        total = 0
        for name, places in zip(self._files.names(), found, strict=True):
            files.append(self._index(name, places, on_progress, total))
            total += files[-1].documents
        if total == 0:
            names = ", ".join(file.name for file in files)
            raise CorpusError(f"corpus: no documents in {names}; give files that contain text")
        per_span = -(-total // MOST_SPANS)
        spans, text_bytes, digests = [], list[int](), list[bytes]()
        for number, places in enumerate(found):
            for first in range(0, len(places.starts), per_span):
                last = min(first + per_span, len(places.starts))
                start, stop = places.starts[first], places.stops[last - 1]
                spans.append(Span(number, first, last - first, start, stop))
                text_bytes.append(sum(places.text_bytes[first:last]))
                digests.append(bytes(places.digests[first * _DIGEST_BYTES : last * _DIGEST_BYTES]))
        has_text = not isinstance(self._files.config, SyntheticCorpus)
        return CorpusIndex(tuple(files), spans, text_bytes, digests if has_text else None, commit)

    def read(
        self, files: Sequence[CorpusFile], spans: Iterable[Span], checksum: str | None = None
    ) -> list[Document]:
        """Read the documents of `spans`, numbered over the whole corpus in the order of `files`.

        Args:
            files: Files as recorded in the plan.
            spans: Spans of these files.
            checksum: Planned checksum of the documents; None if the plan has none. Without it,
                changed files are still noticed, but a changed data set is not.

        Raises:
            CorpusError: The text has changed since it was indexed.
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
                    filter(_has_text, self._files.texts(names[span.file])(span.start, span.stop)),
                    start=base[span.file] + span.first,
                )
            ]
            if checksum not in (None, combined_checksum(document.text for document in documents)):
                raise changed(", ".join(names.values()))
        except CorpusError:
            self._files.hash_again()
            self._present(files, spans)  # raises an error that names the file
            raise
        self._present(files, spans)  # a file may have been rewritten during the read
        return documents

    def consists_of(self, files: Sequence[CorpusFile], commit: str | None = None) -> bool:
        """Return whether the corpus consists of these files, in any order and under any path.

        Names, sizes and (on the hub) commits are compared first, and content only if they differ,
        so that programs that need no text rarely read it. `read` always compares content.

        Args:
            files: Files as recorded in the plan.
            commit: Commit of the data set on the hub, if known.

        Raises:
            CorpusError: Text is missing or unreadable.
        """
        if isinstance(self._files.config, FilesCorpus):
            names = self._files.names()
            if {*names} == {file.name for file in files}:
                return True
            if sorted(map(self._files.size, names)) == sorted(file.bytes or -1 for file in files):
                return True
            fingerprints = [self._files.fingerprint(name) for name in names]
        else:
            current = self._files.pin() if commit else None
            same_name = self._files.names() == [file.name for file in files]
            if current and (current == commit or same_name):
                return current == commit
            fingerprints = [file.fingerprint for file in self.index().files]
        return sorted(fingerprints) == sorted(file.fingerprint for file in files)

    def _index(
        self, name: str, found: "_Found", on_progress: Callable[[int], None], earlier: int
    ) -> CorpusFile:
        """Read one whole file and add its documents to `found`."""
        is_file = isinstance(self._files.config, FilesCorpus)
        before = self._files.state(name) if is_file else None
        blank = refused = 0
        for start, stop, text in self._files.texts(name)(0, None):
            if not text:
                blank += 1
                continue
            if len(found.starts) % _PROGRESS_EVERY == 0:
                on_progress(earlier + len(found.starts))
            found.starts.append(start)
            found.stops.append(stop)
            encodable = is_encodable(text)
            found.text_bytes.append(len(text.encode()) if encodable else 0)
            found.digests += _digest(text)
            refused += not encodable
        if blank or not found.starts:
            logger.log(
                logging.INFO if found.starts else logging.WARNING,
                "%s: %d documents; skipped %d records without text",
                name,
                len(found.starts),
                blank,
            )
        if refused:
            logger.warning(
                "%s: %d of %d documents contain half a surrogate pair, which tokenizers refuse; "
                "they are skipped and counted as refused",
                name,
                refused,
                len(found.starts),
            )
        match self._files.config:
            case FilesCorpus():
                fingerprint = self._files.fingerprint(name)
            case DatasetCorpus():
                fingerprint = hashlib.sha256(found.digests).hexdigest()
            case SyntheticCorpus():
                content = self._files.config.model_dump_json().encode()
                fingerprint = hashlib.sha256(content).hexdigest()
        if is_file and self._files.state(name) != before:
            raise CorpusError(
                f"{name}: changed while it was being read; plan again when it is complete"
            )
        return CorpusFile(
            name=name,
            documents=len(found.starts),
            fingerprint=fingerprint,
            bytes=self._files.size(name) if is_file else None,
        )

    def _present(self, files: Sequence[CorpusFile], spans: Iterable[Span]) -> dict[int, str]:
        """Return the current path of each file of `spans`, by file number."""
        return {
            number: self._files.find(files[number], self._planned.names)
            for number in sorted({span.file for span in spans})
        }


class _Found:
    """Documents of one file: their positions, sizes and checksums."""

    def __init__(self) -> None:
        self.starts, self.stops, self.digests = array("q"), array("q"), bytearray()
        self.text_bytes = array("q")


class _Planned(NamedTuple):
    """Planned files, with lookup tables that every read needs.

    The tables are computed once, because there may be thousands of files.
    """

    files: Sequence[CorpusFile]
    first_numbers: list[int]
    """Number of each file's first document within the corpus."""
    names: set[str]

    @classmethod
    def of(cls, files: Sequence[CorpusFile]) -> "_Planned":
        ends = accumulate((file.documents for file in files), initial=0)
        return cls(files, list(ends), {file.name for file in files})


def is_encodable(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8; JSON may contain half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _has_text(located: LocatedText) -> bool:
    return bool(located.text)


def _digest(text: str) -> bytes:
    return xxhash.xxh3_128_digest(text.encode(errors="surrogatepass"))


def combined_checksum(texts: Iterable[str]) -> str:
    """Compute the checksum of a unit's documents from their texts."""
    return _combined(map(_digest, texts))


def _combined(digests: Iterable[bytes]) -> str:
    """Combine documents' checksums into one."""
    return xxhash.xxh3_128_hexdigest(b"".join(digests))
