"""The chance baseline for word coverage: the words that a randomly rotated copy has.

Among thousands of random directions, some point along a frequent word, so even an untrained
dictionary "has" words. A random rotation of the rows of W_enc preserves norms, biases and the
angles between latents, but destroys what training has found in the data. The rotated copy of a
dictionary of random directions is another dictionary of random directions.

The same words are looked for in the dictionary and in its rotated copy. If both have words only by
chance, a word that only one of them has is equally likely to be in either. So the number of words
that only the dictionary has is binomial (McNemar's exact test).
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from dist_sae.analysis.indexed_run import IndexedRun
from dist_sae.analysis.matching import Matched, Postings, match_words
from dist_sae.analysis.words import WordRows
from dist_sae.checkpoint.state import load_weights
from dist_sae.checkpoint.trained import normalisers_of
from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.plan import load_plan
from dist_sae.dictionaries import build_sae
from dist_sae.dictionaries.axis import WHOLE
from dist_sae.errors import ConfigError, PlanMismatchError, StoreError
from dist_sae.index.encode import Encoder
from dist_sae.index.layout import POSTINGS, IndexManifest
from dist_sae.kernels.choice import choose_kernels
from dist_sae.storage import open_store

CHANCE_ROWS = 262_144
"""Rows that the rotated copy encodes: the first units that fit, but at least two units."""
LEVEL = 0.01
"""Significance level: with a lower p-value, a dictionary finds more than its rotated copy."""
_LARGE = 1000  # words from which the binomial is taken as normal, because 2^-1075 underflows
_ROTATED_ROWS = 65_536  # rows of W_enc that are rotated at a time


class WordComparison(NamedTuple):
    """A comparison of the words that two dictionaries have latents for, on the same rows."""

    of: str
    """Name of the other dictionary, as messages print it."""
    rows: int
    words: int
    """Number of words that are judged."""
    found: int
    by_other: int
    both: int

    @property
    def p_value(self) -> float:
        """Chance of at least as many words that only the dictionary has, if neither is better."""
        own, other = self.found - self.both, self.by_other - self.both
        n = own + other
        if n >= _LARGE:
            return 0.5 * math.erfc((own - 0.5 - n / 2) / math.sqrt(n / 2))
        return math.fsum(math.comb(n, k) * 0.5**n for k in range(own, n + 1))

    @property
    def is_more(self) -> bool:
        """Whether the dictionary has significantly more words than the other one."""
        return self.p_value < LEVEL


def compare_words(
    of: str, rows: int, judged: NDArray[np.bool_], own: NDArray[np.bool_], other: NDArray[np.bool_]
) -> WordComparison:
    """Count the words that the dictionary, the other one, and both have.

    Args:
        of: Name of the other dictionary.
        rows: Number of rows that both were matched on.
        judged: Words that are judged in both.
        own: Words that the dictionary has.
        other: Words that the other dictionary has.
    """
    counts = [int((judged & each).sum()) for each in (own, other, own & other)]
    return WordComparison(of, rows, int(judged.sum()), *counts)


def match_rotated(
    indexed: IndexedRun, words: WordRows, n_concepts: int, matched: Matched, seed: int = 0
) -> tuple[int, Matched, Matched]:
    """Match words with the latents of a dictionary and of its rotated copy, on the same rows.

    Encoding the rows takes most of the time, which is linear in rows and latents. The dictionary
    and the codes of these rows (see `CHANCE_ROWS`) are in memory.

    Args:
        indexed: The dictionary, with its index.
        words: Rows of the words.
        n_concepts: Number of words.
        matched: Matches of the words on all rows.
        seed: Seed of the rotation.

    Returns:
        Number of rows; matches of the dictionary and of its copy on these rows.

    Raises:
        ConfigError: The activations of the rows cannot be read.
    """
    starts, units = words.starts, indexed.index.manifest.units
    n_units = max(int(np.searchsorted(starts, CHANCE_ROWS, side="right")) - 1, min(2, len(units)))
    n_rows = int(starts[n_units])
    within = words.rows < n_rows
    part = WordRows(
        words.rows[within], words.concept[within], words.is_last[within], starts[: n_units + 1]
    )
    whole = n_units == len(units)
    manifest = indexed.index.manifest.model_copy(update={"units": units[:n_units]})
    own = matched if whole else match_words(_Part(indexed.index, manifest), part, n_concepts)
    try:
        rotated = _rotate(indexed, manifest, seed)
    except (StoreError, PlanMismatchError) as exc:
        raise ConfigError(
            f"{indexed.run.name}: cannot read the activations of the index's rows ({exc}), so the "
            f"chance baseline cannot be computed"
        ) from exc
    return n_rows, own, match_words(rotated, part, n_concepts)


class _Part:
    """A view of an index that is restricted to some of its units."""

    def __init__(self, index: Postings, manifest: IndexManifest) -> None:
        self._index, self.manifest = index, manifest
        self._units = pa.array(manifest.units, pa.int32())

    def origins(self, unit: int) -> pa.Table:
        return self._index.origins(unit)

    def has_postings(self, unit: int, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        return self._index.has_postings(unit, rows)

    def bucket_postings(self, bucket: int) -> Iterator[pa.Table]:
        for piece in self._index.bucket_postings(bucket):
            yield self._kept(piece)

    def postings(self, latent: int) -> Iterator[pa.Table]:
        for piece in self._index.postings(latent):
            yield self._kept(piece)

    def _kept(self, piece: pa.Table) -> pa.Table:
        return piece.filter(pc.is_in(piece["unit"], value_set=self._units))


class _Rotated:
    """Codes of the rotated copy, in memory and in the order of an index: latent, unit, row."""

    def __init__(self, index: Postings, manifest: IndexManifest, table: pa.Table) -> None:
        self._index, self.manifest, self._table = index, manifest, table
        self._latents = table["latent"].to_numpy()

    def origins(self, unit: int) -> pa.Table:
        return self._index.origins(unit)

    def has_postings(self, unit: int, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        return self._index.has_postings(unit, rows)

    def bucket_postings(self, bucket: int) -> Iterator[pa.Table]:
        yield self._between(self.manifest.bucket(bucket))

    def postings(self, latent: int) -> Iterator[pa.Table]:
        yield self._between(range(latent, latent + 1))

    def _between(self, latents: range) -> pa.Table:
        start, stop = np.searchsorted(self._latents, [latents.start, latents.stop])
        return self._table.slice(start, stop - start)


@torch.no_grad()
def _rotate(indexed: IndexedRun, manifest: IndexManifest, seed: int) -> _Rotated:
    run, index = indexed.run, indexed.index
    store = open_store(run.store.activations, run.store.s3)
    plan = load_plan(store, run)
    normalisers = normalisers_of(run, indexed.checkpoint)
    sae = build_sae(run.sae, normalisers.widths, WHOLE, choose_kernels("auto", torch.device("cpu")))
    load_weights(sae, indexed.checkpoint)
    d = sae.W_enc.shape[1]
    rotation, _ = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed)))
    for part in torch.split(sae.W_enc.data, _ROTATED_ROWS):
        part.copy_(part @ rotation)
    patience = float(run.timeouts.missing_seconds)
    activations = ActivationSet(store, plan, run.sites, patience_seconds=patience)
    parts: list[list[NDArray[np.generic]]] = []
    with Encoder(sae.eval(), activations, normalisers) as encoder:
        following = iter(manifest.units[1:])
        for unit in manifest.units:
            found = encoder.encode(unit, claim_next=lambda: next(following, None))
            kept = index.has_postings(unit, found.rows.astype(np.int64))
            columns = found.latents[kept], found.rows[kept], found.acts[kept]
            units = np.full(len(columns[0]), unit, np.int32)
            parts.append([columns[0], units, columns[1], columns[2]])
    latents, units, rows, acts = (np.concatenate(each) for each in zip(*parts, strict=True))
    order = np.lexsort((rows, units, latents))
    sorted_ = [pa.array(each[order]) for each in (latents, units, rows, acts)]
    return _Rotated(index, manifest, pa.Table.from_arrays(sorted_, schema=POSTINGS))
