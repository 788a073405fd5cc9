"""delphi: all activations of the latent index, in the layout of delphi's cache (eai-delphi 0.1.3).

    <site>/<first>_<last>.safetensors    a range of latents, which is one bucket of the index:
                                         locations [n, 3]: context, position in it, latent - first
                                         activations [n]: in the units of the index
                                         tokens [contexts, context_tokens]: the same in every file
    <site>/config.json                   written last

delphi's `LatentDataset(<folder>)` reads this cache without running the model. A context is one that
the model was given, with BOS if the model was given BOS. Contexts without a row in the index are
omitted. Short contexts, from the ends of documents, are padded with BOS, or with the special token
of the lowest id if there is no BOS. Activations are sorted by latent, context and position.

Only one bucket's activations are in memory at a time, plus all tokens and eight bytes per row.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dist_sae.checkpoint.piecewise import PiecewiseTensor, safetensors_pieces
from dist_sae.checkpoint.trained import suffix
from dist_sae.config import Run
from dist_sae.config.data import DatasetCorpus
from dist_sae.data.plan import load_plan
from dist_sae.errors import CorpusError, ObjectNotFoundError
from dist_sae.index.query import Index
from dist_sae.index.texts import Texts
from dist_sae.interop.raw import model_name
from dist_sae.storage import UNMETERED, Meter, open_store

CONFIG = "config.json"
_CACHE_FILE = re.compile(r"\d+_\d+\.safetensors|config\.json", re.ASCII)


class _Contexts(NamedTuple):
    tokens: NDArray[np.int32]
    """Token ids, [contexts, context_tokens]."""
    context: dict[int, NDArray[np.int32]]
    """For each unit, the context of each row."""
    position: dict[int, NDArray[np.int32]]
    """For each unit, the position of each row in its context."""


def export_cache(run: Run, meter: Meter = UNMETERED, step: int | None = None) -> str:
    """Write `<run>/export-delphi/<site>/` from the latent index. Returns the folder above it.

    A cache of the same index is not written again.

    Args:
        run: The run.
        meter: Receives the store's metrics.
        step: Step of the index; None for the last step that has a complete index.

    Raises:
        NoIndexError: There is no complete index.
        ConfigError: The index has no postings, or only a share of them.
        CorpusError: The text is missing or has changed.
        CorruptObjectError: The index is damaged.
    """
    runs = open_store(run.store.runs, run.store.s3, meter)
    index = Index(runs, run.name, step=step)
    index.check_all_postings("delphi")
    manifest = index.manifest
    folder = f"{run.name}/export-delphi{suffix(runs, run, manifest.step)}"
    within = f"{folder}/{run.site}"
    wanted = json.dumps(_config(run, index), indent=2).encode()
    buckets = {_name(manifest.bucket(number)): number for number in range(manifest.n_buckets)}
    try:
        there = runs.get(f"{within}/{CONFIG}")
    except ObjectNotFoundError:
        there = b""
    if there == wanted and all(runs.size(f"{within}/{name}") is not None for name in buckets):
        return f"{runs.url}/{folder}"
    contexts = _contexts(run, index)
    old = [key for key in runs.keys(f"{within}/") if _CACHE_FILE.fullmatch(key.rpartition("/")[2])]
    runs.delete_many(old)  # delphi would read files of other ranges too
    for name, number in buckets.items():
        tensors = list(_tensors(index, number, contexts))
        runs.put_stream(f"{within}/{name}", lambda made=tensors: safetensors_pieces(made))  # type: ignore[misc]
    runs.put(f"{within}/{CONFIG}", wanted)
    return f"{runs.url}/{folder}"


def _name(latents: range) -> str:
    return f"{latents.start}_{latents.stop - 1}.safetensors"


def _config(run: Run, index: Index) -> dict[str, Any]:
    """Return the keys of delphi's own `config.json`, and under `dist_sae` the index."""
    dataset = run.corpus if isinstance(run.corpus, DatasetCorpus) else None
    manifest = index.manifest
    return {
        "dataset_repo": run.corpus.label,
        "dataset_split": dataset.split if dataset else "",
        "dataset_name": (dataset.subset or "") if dataset else "",
        "cache_ctx_len": run.activations.context_tokens,
        "n_splits": manifest.n_buckets,
        "model_name": model_name(run),
        "dist_sae": {"index": manifest.name, "checkpoint": manifest.checkpoint},
    }


def _contexts(run: Run, index: Index) -> _Contexts:
    """Collect the contexts of all rows, in the order of units, documents and positions."""
    texts = Texts(run, load_plan(open_store(run.store.activations, run.store.s3), run))
    width, within = run.activations.context_tokens, texts.context_tokens
    tokenizer = texts.tokenizer
    filler = min(tokenizer.special, default=0) if tokenizer.bos is None else tokenizer.bos
    found: list[NDArray[np.int32]] = []
    first = 0
    of_rows: dict[int, NDArray[np.int32]] = {}
    places: dict[int, NDArray[np.int32]] = {}
    for unit in index.manifest.units:
        table = index.origins(unit)
        token, position, document = (table[name].to_numpy() for name in table.column_names)
        number = position // within
        pairs = np.stack([document, number], 1)
        keys, which = np.unique(pairs, axis=0, return_inverse=True)
        of_rows[unit] = (which.reshape(-1) + first).astype(np.int32)
        places[unit] = (position % within + width - within).astype(np.int32)
        texts.read(unit, map(int, np.unique(document)))
        tokens = np.full((len(keys), width), filler, np.int32)
        for row, (of, context) in zip(tokens, keys.tolist(), strict=True):
            ids = texts.tokens(of)[context * within : (context + 1) * within]
            row[width - within : width - within + len(ids)] = ids
        if not np.array_equal(tokens[of_rows[unit] - first, places[unit]], token):
            raise CorpusError(
                f"corpus: the documents of unit {unit} are not the text that the activations were "
                f"computed from; restore the files named in the plan"
            )
        texts.forget()
        first += len(keys)
        found.append(tokens)
    return _Contexts(np.concatenate([np.empty((0, width), np.int32), *found]), of_rows, places)


def _tensors(index: Index, bucket: int, contexts: _Contexts) -> Iterator[PiecewiseTensor]:
    first = index.manifest.bucket(bucket).start
    locations, acts = [np.empty((0, 3), np.int32)], [np.empty(0, np.float32)]
    for table in index.bucket_postings(bucket):
        latent, unit, row, act = (table[name].to_numpy() for name in table.column_names)
        part = np.empty((len(row), 3), np.int32)
        part[:, 2] = latent - first
        for number in np.unique(unit).tolist():
            here = unit == number
            part[here, 0] = contexts.context[number][row[here]]
            part[here, 1] = contexts.position[number][row[here]]
        locations.append(part)
        acts.append(act)
    where, values = np.concatenate(locations), np.concatenate(acts)
    order = np.lexsort((where[:, 1], where[:, 0], where[:, 2]))
    for name, array in (
        ("locations", where[order]),
        ("activations", values[order]),
        ("tokens", contexts.tokens),
    ):
        tensor = torch.from_numpy(array)
        yield PiecewiseTensor(name, tensor.dtype, tuple(tensor.shape), lambda made=tensor: (made,))  # type: ignore[misc]
