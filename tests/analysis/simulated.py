"""Latent indexes of made-up dictionaries and codes, without training or encoding."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from dist_sae.analysis.indexed_run import IndexedDictionary
from dist_sae.analysis.names import token_names
from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.config.index import IndexConfig
from dist_sae.index.coactive import Sample
from dist_sae.index.codes import rounded
from dist_sae.index.decoder import Decoder
from dist_sae.index.encode import Encoded
from dist_sae.index.layout import IndexFolder, IndexManifest, bucket_latents
from dist_sae.index.neighbours import neighbours
from dist_sae.index.query import Index
from dist_sae.index.tables import Origins, build_bucket
from dist_sae.index.units import unit_record, write_unit
from dist_sae.storage import open_store
from dist_sae.storage.records import seal
from tests.world import save

_UNIT_ROWS = 10_000


class Codes(NamedTuple):
    """Activations of latents on rows, in any order."""

    rows: NDArray[np.int64]
    latents: NDArray[np.int64]
    acts: NDArray[np.float64]


def joined(parts: list[Codes]) -> Codes:
    return Codes(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def simulate(
    folder: Path,
    directions: NDArray[np.float64],
    codes: Codes,
    *,
    n_rows: int,
    tokens: NDArray[np.int32] | None = None,
    **settings: Any,
) -> IndexedDictionary:
    """Write an index as `dist-sae index` does, from a decoder and codes, and open it.

    Args:
        folder: Folder for the store.
        directions: Decoder rows, [n_latents, d].
        codes: Activations.
        n_rows: Number of rows.
        tokens: Token of each row; None for token 0.
        settings: Section `index` of a run file.
    """
    store, n = open_store(str(folder)), len(directions)
    W_dec = torch.from_numpy(directions.astype(np.float32))
    checkpoints = Checkpoints(store, "world", 1)
    save(checkpoints, 1, {"W_dec": W_dec, "b_dec": torch.zeros(W_dec.shape[1])}, {})
    checkpoint = checkpoints.open(1)
    config = IndexConfig(**{"pairs": n_rows, **settings})
    index_folder = IndexFolder("world", "made-up")
    units = range(-(-n_rows // _UNIT_ROWS))
    manifest = IndexManifest(
        name="made-up",
        run="world",
        created_by="test",
        step=1,
        checkpoint=checkpoint.digest,
        plan="plan",
        site="synthetic",
        scale=1.0,
        n_latents=n,
        bucket_latents=bucket_latents(n),
        units=tuple(units),
        planned_rows=n_rows,
        settings=config.deciding(),
        seed=0,
    )
    store.put(index_folder.manifest, seal(manifest))
    sae = cast(Any, SimpleNamespace(first_latent=0, W_enc=W_dec))
    order = np.lexsort((codes.latents, codes.rows))
    rows, latents, acts = (column[order] for column in codes)
    named = np.zeros(n_rows, np.int32) if tokens is None else tokens
    records = []
    for unit in units:
        first = unit * _UNIT_ROWS
        here = slice(*np.searchsorted(rows, [first, first + _UNIT_ROWS]))
        numbers = np.arange(first, min(first + _UNIT_ROWS, n_rows))
        encoded = Encoded(
            unit,
            (named[numbers], (numbers % 100).astype(np.int32), numbers // 100),
            (0.0, 1.0, len(rows[here])),
            latents[here].astype(np.int32),
            (rows[here] - first).astype(np.int32),
            rounded(acts[here].astype(np.float32)),
        )
        written = [write_unit(store, index_folder, manifest, sae, encoded)]
        records.append(unit_record(manifest, encoded, written))
        store.put(index_folder.units.key(unit), seal(records[-1]))
    sample = Sample(store, manifest, records) if manifest.pair_share else None
    for bucket in range(manifest.n_buckets):
        span = manifest.bucket(bucket)
        columns = _columns(span, directions)
        if m := config.neighbours:
            near = neighbours(checkpoint, span, m)
            for name, found in (("nearest", near.latents), ("nearest_cosine", near.cosines)):
                kept = [row[mask] for row, mask in zip(found, near.latents >= 0, strict=True)]
                columns[name] = pa.array([row.numpy() for row in kept], columns[name].type)
        made = (records, bucket, columns, Origins(store, records), sample)
        record = build_bucket(store, index_folder, manifest, *made)
        store.put(index_folder.buckets.key(bucket), seal(record))
    return IndexedDictionary(
        Index(store, "world", "made-up"), Decoder(checkpoint), token_names(None)
    )


def _columns(span: range, directions: NDArray[np.float64]) -> dict[str, pa.Array]:
    norms = np.linalg.norm(directions[span.start : span.stop], axis=1)
    columns = {"decoder_norm": norms, "encoder_norm": norms, "encoder_bias": 0 * norms}
    arrays = {name: pa.array(column, pa.float32()) for name, column in columns.items()}
    for name in ("nearest", "top_tokens", "bottom_tokens"):
        arrays[name] = pa.array([[]] * len(span), pa.list_(pa.int32()))
    for name in ("nearest_cosine", "top_logits", "bottom_logits"):
        arrays[name] = pa.array([[]] * len(span), pa.list_(pa.float32()))
    return arrays
