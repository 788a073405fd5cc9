"""delphi's cache has the index's activations, at the tokens that the model was given.

`read` is an independent implementation of eai-delphi 0.1.3's loader.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from dist_sae.commands.cli import main
from dist_sae.config import Run, dump_run
from dist_sae.errors import ConfigError, CorpusError
from dist_sae.index import layout
from dist_sae.index.query import Index
from dist_sae.index.texts import Texts
from dist_sae.interop.delphi import export_cache
from dist_sae.storage import open_store
from tests.index.indexed import add_checkpoint, make_index, produced

Postings = dict[int, list[tuple[int, int, float]]]


def read(folder: Path) -> tuple[Postings, NDArray[np.int64]]:
    """Return (context, place, activation) of each latent, and the tokens."""
    found: Postings = {}
    tokens: NDArray[Any] = np.empty(0)
    for file in folder.glob("*.safetensors"):
        first, last = map(int, file.stem.split("_"))
        split = safetensors.numpy.load_file(file)
        tokens = split["tokens"].astype(np.int64)
        for (context, place, latent), act in zip(
            split["locations"].tolist(), split["activations"].tolist(), strict=True
        ):
            assert first <= first + latent <= last
            found.setdefault(first + latent, []).append((context, place, act))
    return found, tokens


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with an index of several buckets, and documents of one and a quarter contexts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "LEAST_LATENTS", 16)
        sizes = {"context_tokens": 24, "sites": ["synthetic"]}
        run = produced(tmp_path_factory.mktemp("delphi"), "batchtopk", activations=sizes)
        add_checkpoint(run)
        make_index(run)
    return run


@pytest.mark.system
def test_a_cache_has_the_activations_of_the_index(indexed: Run) -> None:
    folder = Path(export_cache(indexed))
    found, tokens = read(folder / "synthetic")
    index = Index(open_store(indexed.store.runs), indexed.name)
    assert index.manifest.n_buckets > 1
    assert len(list(folder.glob("synthetic/*.safetensors"))) == index.manifest.n_buckets
    assert tokens.shape[1] == 24
    assert found
    contexts: dict[int, tuple[int, int]] = {}
    for latent in range(64):
        here = found.get(latent, [])
        assert here == sorted(here)
        expected = []
        for table in index.postings(latent):
            for posting in table.to_pylist():
                origin = index.origins(posting["unit"]).slice(posting["row"], 1).to_pylist()[0]
                expected.append((origin["document"], origin["position"], posting["act"], origin))
        acts = {(document, position): act for document, position, act, _ in expected}
        token_of = {(d, p): origin["token"] for d, p, _, origin in expected}
        assert len(here) == len(acts)
        for context, place, act in here:
            match = [key for key in acts if acts[key] == act and key[1] % 24 == place]
            assert match
            if len(match) == 1:  # then the document and its context are known
                (document, position) = match[0]
                assert contexts.setdefault(context, (document, position // 24)) == (
                    document,
                    position // 24,
                )
                assert tokens[context, place] == token_of[document, position]
    assert len(contexts) > 10
    assert len(set(contexts.values())) == len(contexts)


def test_a_cache_is_made_once_for_an_index(indexed: Run, tmp_path: Path) -> None:
    folder = Path(export_cache(indexed)) / "synthetic"
    (folder / "notes.txt").write_text("mine")
    (folder / "0_7.safetensors").write_bytes(b"of an older index")
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    export_cache(indexed)
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    (folder / "config.json").unlink()
    path = tmp_path / "run.yaml"
    path.write_text(dump_run(indexed))
    assert main(["export", str(path), "--format", "delphi"]) == 0
    assert {file.name for file in folder.iterdir()} == before.keys() - {"0_7.safetensors"}
    config = json.loads((folder / "config.json").read_text())
    assert (config["cache_ctx_len"], config["n_splits"]) == (24, len(before) - 3)


def test_a_share_of_the_postings_and_other_text_are_refused(
    indexed: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Path(export_cache(indexed)) / "synthetic/config.json"
    config.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Texts, "tokens", lambda *_: [0] * 32)
        with pytest.raises(CorpusError, match="of unit 0 are not the text that the activations"):
            export_cache(indexed)
    assert not config.exists()
    monkeypatch.setattr(layout.IndexManifest, "postings_share", 0.5)
    with pytest.raises(ConfigError, match="has only a share of the postings"):
        export_cache(indexed)
