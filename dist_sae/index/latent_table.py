"""Partial reads of tables that are sorted by latent: only the row groups of one latent."""

import io
import threading
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache, partial
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dist_sae.errors import CorruptObjectError, ObjectNotFoundError
from dist_sae.index.layout import Stored, read_stored
from dist_sae.storage import ObjectStore
from dist_sae.storage.records import READS

WHOLE_BYTES = 2**20
"""Largest object that is read whole and cached, which takes no longer than reading a part."""
TAIL_BYTES = 2**16
"""Bytes read first from the end of a larger object. They nearly always contain its footer."""

Read = TypeVar("Read")


class LatentTable:
    """A Parquet table whose first column is the latent, in ascending order.

    An object that is read whole is checked against its sha256. In a larger object, each page that
    is read is checked against its CRC-32. The footer, which contains the offsets of the pages, has
    no checksum.

    Args:
        store: The store of the object.
        stored: The object.
    """

    def __init__(self, store: ObjectStore, stored: Stored) -> None:
        self._store = store
        self._stored = stored
        self._whole: bytes | None = None
        self._lock = threading.Lock()  # guards the footer and the cached bytes
        # cached, because latents are often read in order
        self._group = lru_cache(1)(lambda group: self._parsed(partial(self._read, group)))

    def of(self, latent: int) -> Iterator[pa.Table]:
        """Yield a latent's rows, one row group after another, or an empty table if it has none.

        Raises:
            CorruptObjectError: The part that was read is damaged, or the object is gone.
        """
        with self._lock:
            groups = [i for i, span in self._spans.items() if latent in span]
        if not groups:
            yield self._footer.schema.to_arrow_schema().empty_table()
        for group in groups:
            rows = self._group(group)
            yield rows.filter(pc.equal(rows["latent"], latent))

    @cached_property
    def _footer(self) -> pq.FileMetaData:
        return self._parsed(self._read_footer)

    @cached_property
    def _spans(self) -> dict[int, range]:
        """The range of latents in each row group, except empty groups."""
        groups = {i: self._footer.row_group(i) for i in range(self._footer.num_row_groups)}
        found = {i: group.column(0).statistics for i, group in groups.items() if group.num_rows}
        return {i: range(statistics.min, statistics.max + 1) for i, statistics in found.items()}

    def _read_footer(self) -> pq.FileMetaData:
        size = self._stored.bytes
        tail = self._bytes(max(0, size - TAIL_BYTES), size)
        # a Parquet file ends with its footer, the footer's length in four bytes and "PAR1"
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if length > len(tail):
            tail = self._bytes(max(0, size - length), size)
        return pq.read_metadata(pa.BufferReader(tail[-length:]))

    def _read(self, group: int) -> pa.Table:
        metadata = self._footer.row_group(group)
        chunks = [metadata.column(i) for i in range(metadata.num_columns)]
        starts = [
            chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
            for chunk in chunks
        ]
        ends = [s + c.total_compressed_size for s, c in zip(starts, chunks, strict=True)]
        window = _Window(self._bytes(min(starts), max(ends)), min(starts), self._stored.bytes)
        file = pq.ParquetFile(window, metadata=self._footer, page_checksum_verification=True)
        return file.read_row_group(group, use_threads=False)

    def _bytes(self, start: int, stop: int) -> bytes:
        if self._stored.bytes > WHOLE_BYTES:
            return self._store.get(self._stored.key, start, stop)
        self._whole = self._whole or read_stored(self._store, self._stored)
        return self._whole[start:stop]

    def _parsed(self, read: Callable[[], Read]) -> Read:
        """Call `read`, and call it again if the data are damaged."""
        reason = ""
        for _ in range(READS):
            try:
                return read()
            except ObjectNotFoundError:
                reason = "is gone"
            except (pa.ArrowException, OSError) as exc:
                reason = f"is damaged ({str(exc).splitlines()[0]})"
        raise CorruptObjectError(
            f"{reason}; run `dist-sae index --repair`",
            url=self._store.url,
            key=self._stored.key,
        )


class _Window(io.RawIOBase):
    """A read-only file of `size` bytes, of which only `data`, from `start` on, is in memory."""

    def __init__(self, data: bytes, start: int, size: int) -> None:
        self._data = memoryview(data)
        self._start = start
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        at = self._at - self._start
        if at < 0:
            raise OSError("is outside what was read")
        found = bytes(self._data[at : None if size < 0 else at + size])
        self._at += len(found)
        return found
