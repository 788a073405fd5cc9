"""A latent index in memory, with made-up activations and text."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dist_sae.index.layout import POSTINGS, ROWS, IndexManifest

VOCABULARY = (" gold", " silver", " hel", "ium", " the", ".", " Paris", " paris", "s", "-", "en")
"""Texts of the tokens."""


class Vocabulary:
    """Tokenizer with `VOCABULARY` or other token texts. Can only decode."""

    bos = None
    special: frozenset[int] = frozenset()

    def __init__(self, texts: Sequence[str] = VOCABULARY) -> None:
        self.texts = texts

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        raise NotImplementedError

    def text(self, tokens: Sequence[int]) -> list[str]:
        return [self.texts[token] for token in tokens]


class InMemoryIndex:
    """An index in memory.

    Args:
        tokens: Token of each row, over all units.
        unit_rows: Rows per unit.
        codes: Rows (numbered over all units) and activations of each latent.
        n_latents: Number of latents.
        documents: Document of each row. By default, each unit is one document.
        positions: Position of each row in its context. By default, its place in the unit.
        bucket_latents: Latents per bucket.
        piece_entries: Entries per table of postings.
    """

    def __init__(
        self,
        tokens: NDArray[np.int32],
        unit_rows: int,
        codes: Mapping[int, tuple[NDArray[np.int64], NDArray[np.float32]]],
        n_latents: int = 1,
        *,
        documents: NDArray[np.int64] | None = None,
        positions: NDArray[np.int32] | None = None,
        bucket_latents: int = 4,
        piece_entries: int = 1000,
    ) -> None:
        self._tokens, self._unit_rows, self._codes = tokens, unit_rows, codes
        n = len(tokens)
        self._documents = np.arange(n) // unit_rows if documents is None else documents
        own = (np.arange(n) % unit_rows).astype(np.int32)
        self._positions = own if positions is None else positions
        self._piece = piece_entries
        self.n_latents = n_latents
        self.rows = n
        self.manifest = IndexManifest(
            name="made",
            run="made",
            created_by="",
            step=1,
            checkpoint="",
            plan="",
            site="",
            scale=1,
            n_latents=n_latents,
            bucket_latents=bucket_latents,
            # so that confusing a unit's number with its position in the list fails
            units=tuple(3 + 2 * unit for unit in range(-(-n // unit_rows))),
            planned_rows=n,
            settings={},
            seed=0,
        )

    def origins(self, unit: int) -> pa.Table:
        first = (unit - 3) // 2 * self._unit_rows
        here = slice(first, first + self._unit_rows)
        columns = [
            self._tokens[here].astype(np.int32),
            self._positions[here],
            self._documents[here].astype(np.int64),
        ]
        return pa.Table.from_arrays(list(map(pa.array, columns)), schema=ROWS)

    def has_postings(
        self,
        unit: int,  # noqa: ARG002 - as the interface has it
        rows: NDArray[np.int64],
    ) -> NDArray[np.bool_]:
        return np.ones(len(rows), np.bool_)

    def postings(self, latent: int) -> Iterator[pa.Table]:
        yield POSTINGS.empty_table()
        if latent in self._codes:
            rows, acts = self._codes[latent]
            yield self._table(np.full(len(rows), latent), rows, acts)

    def bucket_postings(self, bucket: int) -> Iterator[pa.Table]:
        parts = [self.postings(latent) for latent in self.manifest.bucket(bucket)]
        whole = pa.concat_tables(table for part in parts for table in part)
        for start in range(0, whole.num_rows, self._piece):
            yield whole.slice(start, self._piece)

    def _table(
        self, latents: NDArray[np.int64], rows: NDArray[np.int64], acts: NDArray[np.float32]
    ) -> pa.Table:
        columns = [
            latents.astype(np.int32),
            (3 + 2 * (rows // self._unit_rows)).astype(np.int32),
            (rows % self._unit_rows).astype(np.int32),
            acts.astype(np.float32),
        ]
        return pa.Table.from_arrays(list(map(pa.array, columns)), schema=POSTINGS)
