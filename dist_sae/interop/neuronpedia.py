"""Neuronpedia: pages of latents, in the layout of its exports, which its import reads.

    <model>/<layer>-<set>/
      release.jsonl, model.jsonl, sourceset.jsonl    one object each
      features/batch-<n>.jsonl.gz                    one line of numbers per latent
      activations/batch-<n>.jsonl.gz                 one line per text, with its activations
      explanations/batch-<n>.jsonl.gz                the explanations of `dist-sae explain`
      source.jsonl                                   written last, except for explanations

An object contains only columns of its table in Neuronpedia's database (schema of November 2026),
without the columns that have defaults. Activations and effects on logits are in the scale of
`export --format sae-lens`: codes f' = |d| f, and decoder rows of length 1 / s.

Histograms of logits and Pearson correlations of latents are omitted, because the index does not
have them. Latents that never fire have no page. A text never extends beyond one context.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from dist_sae import __version__
from dist_sae.checkpoint.trained import (
    find_checkpoint,
    no_checkpoint_error,
    normalisers_of,
    suffix,
    trained_run,
)
from dist_sae.config import Run
from dist_sae.config.data import HuggingFaceModel, layer_of
from dist_sae.data.plan import load_plan
from dist_sae.errors import ConfigError, NoIndexError, ObjectNotFoundError
from dist_sae.explaining.explanations import ScoredExplanation, explanations_of
from dist_sae.explaining.stored import sets
from dist_sae.index.examples import activations_near, drop_overlapping, read_documents
from dist_sae.index.layout import DECILES, HISTOGRAM_BARS, TOP
from dist_sae.index.query import Firing, Index, LatentPage
from dist_sae.index.texts import Place, Texts, build_example
from dist_sae.interop.raw import model_name
from dist_sae.interop.sae_lens import hook
from dist_sae.storage import UNMETERED, Meter, ObjectStore, open_store

LATENTS = 128
"""Latents per batch, or more if there would be more than `MOST_BATCHES` batches."""
MOST_BATCHES = 1000
"""Most files in a folder. Neuronpedia's import makes one list request, so it sees no more."""
MOST_TEXTS = 20
"""Most texts per latent for its largest activations."""
_CONTEXT_TOKENS = 64  # tokens on either side of an activation
_GZIP_LEVEL = 6  # takes a fifth of the time of level 9, for files 4 % larger
_COMPLETION_FILE = "source.jsonl"

_Row = dict[str, Any]


class _Names(NamedTuple):
    model: str
    source_set: str
    source: str
    creator: str


def export_pages(run: Run, meter: Meter = UNMETERED, step: int | None = None) -> str:
    """Write `<run>/export-neuronpedia/<model>/<layer>-<set>/` from the latent index.

    Pages of the same index are not written again, but explanations always are.

    Args:
        run: The run.
        meter: Receives the store's metrics.
        step: Step of the index; None for the last step that has a complete index.

    Returns:
        Path or URL of the folder above `<model>`.

    Raises:
        NoIndexError: There is no complete index, or its checkpoint has been replaced.
        ConfigError: Neuronpedia cannot show the run's latents, the index does not have all
            postings, or there is no checkpoint.
        CorpusError: The text is missing or has changed.
        CorruptObjectError: The index is damaged.
    """
    names = _names(run)
    runs = open_store(run.store.runs, run.store.s3, meter)
    index = Index(runs, run.name, step=step)
    index.check_all_postings("Neuronpedia")
    folder = f"{run.name}/export-neuronpedia{suffix(runs, run, index.manifest.step)}"
    prefix = f"{folder}/{names.model}/{names.source}"
    last = _lines([_source(run, names, index)])
    fires = [latent for latent, n in enumerate(index.firings.tolist()) if n]
    size = max(LATENTS, -(-len(fires) // MOST_BATCHES))
    batches = [fires[i : i + size] for i in range(0, len(fires), size)]
    if not _is_complete(runs, prefix, last, len(batches)):
        _write_pages(run, names, index, runs, prefix, batches)
        runs.put(f"{prefix}/{_COMPLETION_FILE}", last)
    _write_explanations(names, index, runs, prefix, batches)
    return f"{runs.url}/{folder}"


def _names(run: Run) -> _Names:
    """Return Neuronpedia's ids of the model, the source set and the source, and the creator.

    Raises:
        ConfigError: Neuronpedia cannot show the run's latents.
    """
    if not isinstance(run.model, HuggingFaceModel):
        raise ConfigError(
            f"model.kind: {run.model.kind}: Neuronpedia supports only language models"
        )
    if len(run.reads) > 1:
        raise ConfigError(
            f"sae.reads: {run.described_sites}: Neuronpedia supports only latents of one layer"
        )
    given, name = run.export.neuronpedia, model_name(run).rstrip("/").rpartition("/")[2]
    model = given.model or re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")
    source_set = given.source_set or run.name
    layer = layer_of(run.site.partition("@")[0])
    return _Names(model, source_set, f"{layer}-{source_set}", given.creator)


def _is_complete(runs: ObjectStore, prefix: str, last: bytes, batches: int) -> bool:
    """Return whether all pages of the same index exist."""
    try:
        there = runs.get(f"{prefix}/{_COMPLETION_FILE}")
    except ObjectNotFoundError:
        return False
    kinds = ("features", "activations")
    keys = (_batch(prefix, kind, number) for kind in kinds for number in range(batches))
    return there == last and all(runs.size(key) is not None for key in keys)


def _write_pages(
    run: Run,
    names: _Names,
    index: Index,
    runs: ObjectStore,
    prefix: str,
    batches: list[list[int]],
) -> None:
    checkpoint = find_checkpoint(runs, run, index.manifest.step)
    if checkpoint is None:
        raise no_checkpoint_error(runs, run)
    if checkpoint.digest != index.manifest.checkpoint:
        raise NoIndexError(
            f"{index.place}: was built from another checkpoint; set a new index.name"
        )
    own = trained_run(checkpoint, run)
    scale = normalisers_of(own, checkpoint).by_site[own.writes[0]].scale
    _delete_batches(runs, prefix, ("features", "activations"))
    for name, row in (
        ("release", _release(own, names)),
        ("model", _model(run, names)),
        ("sourceset", _source_set(own, names)),
    ):
        runs.put(f"{prefix}/{name}.jsonl", _lines([row]))
    texts = Texts(run, load_plan(open_store(run.store.activations, run.store.s3), run))
    _, hook_name = hook(run.model, run.site)
    for number, latents in enumerate(batches):
        pages = [index.latent(latent) for latent in latents]
        features = (_feature(page, names, texts, scale) | {"hookName": hook_name} for page in pages)
        runs.put(_batch(prefix, "features", number), _gzipped(features))
        chosen = [_select_firings(page) for page in pages]
        read_documents(texts, [firing for firings in chosen for firing in firings])
        rows = (
            row
            for page, firings in zip(pages, chosen, strict=True)
            for row in _activations(page, firings, names, index, texts)
        )
        runs.put(_batch(prefix, "activations", number), _gzipped(rows))
        texts.forget()


def _write_explanations(
    names: _Names, index: Index, runs: ObjectStore, prefix: str, batches: list[list[int]]
) -> None:
    _delete_batches(runs, prefix, ("explanations",))
    among = sets(index)
    for number, latents in enumerate(batches if among else ()):
        rows = [
            _explanation(latent, scored, names, index)
            for latent in latents
            for scored in explanations_of(latent, among)
        ]
        if rows:
            runs.put(_batch(prefix, "explanations", number), _gzipped(rows))


def _delete_batches(runs: ObjectStore, prefix: str, kinds: Iterable[str]) -> None:
    for kind in kinds:  # an older export may have more batches
        runs.delete_many(list(runs.keys(f"{prefix}/{kind}/batch-")))


def _batch(prefix: str, kind: str, number: int) -> str:
    return f"{prefix}/{kind}/batch-{number}.jsonl.gz"


def _release(run: Run, names: _Names) -> _Row:
    return {
        "name": names.source_set,
        "description": f"{run.name}: {run.sae.kind} dictionary of {run.described_sites}",
        "creatorName": names.creator,
        "creatorId": names.creator,
        "visibility": "PUBLIC",
    }


def _model(run: Run, names: _Names) -> _Row:
    name = model_name(run)
    return {
        "id": names.model,
        "displayName": name,
        "displayNameShort": names.model,
        "creatorId": names.creator,
        "owner": name.rpartition("/")[0],
        "layers": 0,
        "neuronsPerLayer": 0,
        "visibility": "PUBLIC",
    }


def _source_set(run: Run, names: _Names) -> _Row:
    return {
        "modelId": names.model,
        "name": names.source_set,
        "description": f"{run.sae.kind}, {run.sae.n_latents:,} latents",
        "creatorName": names.creator,
        "creatorId": names.creator,
        "releaseName": names.source_set,
        "urls": [],
        "visibility": "PUBLIC",
    }


def _source(run: Run, names: _Names, index: Index) -> _Row:
    manifest = index.manifest
    return {
        "id": names.source,
        "modelId": names.model,
        "setName": names.source_set,
        "creatorId": names.creator,
        "dataset": run.corpus.label,
        "num_tokens_in_prompt": run.activations.context_tokens,
        "notes": f"dist_sae {__version__}, index {manifest.name}, checkpoint {manifest.checkpoint}",
        "visibility": "PUBLIC",
    }


def _feature(page: LatentPage, names: _Names, texts: Texts, scale: float) -> _Row:
    """Return a latent's line of `features/`."""
    norm = page.decoder_norm
    effect = 1 / (norm * scale) if norm else 0.0
    ends = {"pos": page.top_tokens, "neg": page.bottom_tokens}
    bar = page.max * norm / HISTOGRAM_BARS
    return {
        "modelId": names.model,
        "layer": names.source,
        "index": str(page.latent),
        "sourceSetName": names.source_set,
        "creatorId": names.creator,
        "maxActApprox": page.max * norm,
        "frac_nonzero": page.density,
        "freq_hist_data_bar_heights": list(page.histogram),
        "freq_hist_data_bar_values": [(i + 0.5) * bar for i in range(HISTOGRAM_BARS)],
        "topkCosSimIndices": [near.latent for near in page.nearest],
        "topkCosSimValues": [near.cosine for near in page.nearest],
        **{f"{end}_str": [_text(o.token, texts) for o in found] for end, found in ends.items()},
        **{f"{end}_values": [o.logit * effect for o in found] for end, found in ends.items()},
    }


def _select_firings(page: LatentPage) -> list[Firing]:
    """Return the firings whose texts are written: the largest, without overlap, and deciles'."""
    largest = list(drop_overlapping(page.largest, _CONTEXT_TOKENS))[:MOST_TEXTS]
    return [*largest, *(firing for firing in page.examples if firing.decile != TOP)]


def _activations(
    page: LatentPage, firings: list[Firing], names: _Names, index: Index, texts: Texts
) -> Iterator[_Row]:
    """Yield a latent's lines of `activations/`."""
    known, norm = activations_near(index, page.latent, firings), page.decoder_norm
    edges = [0.0, *page.deciles, page.max]
    for number, firing in enumerate(firings):
        place = Place(firing.document, firing.position, firing.token)
        example = build_example(place, known, texts, _CONTEXT_TOKENS)
        first = next(i for i, token in enumerate(example.tokens) if token.in_context)
        tokens = [token for token in example.tokens if token.in_context]
        values = [token.act * norm for token in tokens]
        largest = max(range(len(values)), key=values.__getitem__)
        bins: tuple[float, float, float] = (-1, page.max * norm, -1)  # for the largest
        if firing.decile != TOP:
            low, high = edges[firing.decile : firing.decile + 2]
            bins = (low * norm, high * norm, 1 / DECILES)
        yield {
            "id": _id(index, "activation", page.latent, number),
            "modelId": names.model,
            "layer": names.source,
            "index": str(page.latent),
            "tokens": [token.text for token in tokens],
            "values": values,
            "maxValue": values[largest],
            "maxValueTokenIndex": largest,
            "minValue": min(values),
            "creatorId": names.creator,
            "binMin": bins[0],
            "binMax": bins[1],
            "binContains": bins[2],
            "qualifyingTokenIndex": example.peak - first,
        }


def _explanation(latent: int, scored: ScoredExplanation, names: _Names, index: Index) -> _Row:
    """Return a line of `explanations/`."""
    return {
        "id": _id(index, scored.name, latent, scored.explanation),
        "modelId": names.model,
        "layer": names.source,
        "index": str(latent),
        "description": scored.explanation,
        "authorId": names.creator,
        "notes": f"{scored.name}; {scored.score_text}".rstrip("; "),
    }


def _text(token: int, texts: Texts) -> str:
    return texts.tokenizer.text([token])[0]


def _id(index: Index, *parts: object) -> str:
    """Return an id that is the same in every export, with 25 characters like Neuronpedia's ids."""
    named = json.dumps([index.manifest.checkpoint, index.manifest.name, *map(str, parts)])
    return "c" + hashlib.sha256(named.encode()).hexdigest()[:24]


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _gzipped(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return gzip.compress(_lines(rows), _GZIP_LEVEL, mtime=0)
