"""Codes as stage 1 stores them, and seeded choices of rows."""

from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from dist_sae.errors import CorruptObjectError, ObjectNotFoundError
from dist_sae.index.layout import CodesChunk
from dist_sae.storage import ObjectStore
from dist_sae.storage.records import READS


class Codes(NamedTuple):
    """Codes of a unit, grouped by latent or by row."""

    counts: NDArray[np.int32]
    """Entries of each group."""
    places: NDArray[np.int32]
    """If groups are latents, the row of each entry, ascending within a group; if groups are rows,
    the latent."""
    acts: NDArray[np.float32]

    def to_bytes(self) -> bytes:
        """Little-endian int32 counts, int32 places and fp32 acts, one after the other."""
        return b"".join(
            part.astype(dtype).tobytes()
            for part, dtype in zip(self, ("<i4", "<i4", "<f4"), strict=True)
        )

    @classmethod
    def of(cls, numbers: NDArray[np.int32], chunk: CodesChunk) -> "Codes":
        """The codes of a chunk, whose bytes are given as little-endian int32; copies nothing."""
        counts, places, acts = np.split(numbers, (chunk.groups, chunk.groups + chunk.entries))
        return cls(counts, places, acts.view("<f4"))


def read_codes(store: ObjectStore, chunk: CodesChunk) -> Codes:
    """Read codes.

    Raises:
        CorruptObjectError: They do not match their checksum, or are gone.
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
    """Round positive numbers to 11 significant bits: those of fp16, in the range of fp32."""
    bits = acts.view(np.uint32) + np.uint32(0x1000)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def chances(
    seed: int, purpose: int, unit: NDArray[Any] | int, row: NDArray[Any]
) -> NDArray[np.uint64]:
    """A random number below 2^64 for each row: splitmix64's finaliser of (unit, row).

    It is the same on every machine and in any order of rows. Rows whose number is below a share are
    among those of any larger share.
    """
    x = np.asarray(unit, dtype=np.uint64) << np.uint64(32) | row.astype(np.uint64)
    for number in (seed, purpose):
        x = x + np.uint64((0x9E3779B97F4A7C15 * (number + 1)) % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return x


def below(share: float) -> np.uint64:
    """The number below which this share of the rows lies; 1 leaves out one row in 2^64."""
    return np.uint64(min(2**64 - 1, int(share * 2**64)))


POSTINGS_CHANCE, PAIRS_CHANCE, DECILE_CHANCE = range(3)
"""Purposes of `chances`."""
