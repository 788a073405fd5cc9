"""The stored format of stage 1's codes, and seeded sampling of rows."""

from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from dist_sae.errors import CorruptObjectError, ObjectNotFoundError
from dist_sae.index.layout import CodesChunk
from dist_sae.storage import ObjectStore
from dist_sae.storage.records import READS


class Codes(NamedTuple):
    """The codes of a unit, grouped by latent or by row."""

    counts: NDArray[np.int32]
    """Number of entries in each group."""
    places: NDArray[np.int32]
    """Row of each entry if the groups are latents (ascending within a group), else its latent."""
    acts: NDArray[np.float32]

    def to_bytes(self) -> bytes:
        """Encode as int32 counts, int32 places and fp32 acts in sequence, all little-endian."""
        return b"".join(
            part.astype(dtype).tobytes()
            for part, dtype in zip(self, ("<i4", "<i4", "<f4"), strict=True)
        )

    @classmethod
    def of(cls, numbers: NDArray[np.int32], chunk: CodesChunk) -> "Codes":
        """View a chunk's bytes, given as little-endian int32, as codes. Copies nothing."""
        counts, places, acts = np.split(numbers, (chunk.groups, chunk.groups + chunk.entries))
        return cls(counts, places, acts.view("<f4"))


def read_codes(store: ObjectStore, chunk: CodesChunk) -> Codes:
    """Read a chunk of codes.

    Raises:
        CorruptObjectError: The bytes do not match the checksum, or the object is gone.
    """
    for _ in range(READS):
        try:
            data = store.get(chunk.key, chunk.offset, chunk.offset + chunk.bytes)
        except ObjectNotFoundError as exc:
            raise CorruptObjectError("is gone", url=store.url, key=chunk.key) from exc
        if xxhash.xxh3_128_hexdigest(data) == chunk.xxh3:
            return Codes.of(np.frombuffer(data, "<i4"), chunk)
    raise CorruptObjectError("does not match its checksum", url=store.url, key=chunk.key)


def rounded(acts: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round positive numbers to 11 significant bits: fp16's precision in the range of fp32."""
    bits = acts.view(np.uint32) + np.uint32(0x1000)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def row_hashes(
    seed: int, purpose: int, unit: NDArray[Any] | int, row: NDArray[Any]
) -> NDArray[np.uint64]:
    """Return a hash below 2^64 for each row: splitmix64's finalizer of (unit, row).

    The hash is the same on every machine and in any order of rows. Rows that are sampled for one
    share are also sampled for any larger share.
    """
    x = np.asarray(unit, dtype=np.uint64) << np.uint64(32) | row.astype(np.uint64)
    for number in (seed, purpose):
        x = x + np.uint64((0x9E3779B97F4A7C15 * (number + 1)) % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return x


def hash_bound(share: float) -> np.uint64:
    """Return the bound on `row_hashes` that samples this share of rows. 1 omits one row in 2^64."""
    return np.uint64(min(2**64 - 1, int(share * 2**64)))


POSTINGS_SAMPLING, PAIRS_SAMPLING, DECILE_SAMPLING = range(3)
"""Values for `purpose` in `row_hashes`."""
