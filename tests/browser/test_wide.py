"""A wide index: a page reads only what it shows, and its reads do not grow with the dictionary."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dist_sae.index.latent_table
import dist_sae.index.tables
from dist_sae.browser.lists import ListQuery
from dist_sae.browser.pages import Pages
from dist_sae.config import Run
from dist_sae.notebook.run import OpenedRun
from dist_sae.storage import open_store
from tests.browser.served_runs import index_of
from tests.browser.wide import make_wide

pytestmark = pytest.mark.system

N = 4096


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Make a run with small row groups, so that a table has many, as with a million latents."""
    with pytest.MonkeyPatch.context() as patch:
        rows = {"latents": 64, "examples": 256, "pairs": 256}
        patch.setattr(dist_sae.index.tables, "GROUP_ROWS", rows)
        return make_wide(tmp_path_factory.mktemp("wide"), N, documents=60, n_tokens=600)


def test_pages_read_what_they_show(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist_sae.index.latent_table, "WHOLE_BYTES", 0)
    monkeypatch.setattr(dist_sae.index.latent_table, "TAIL_BYTES", 20_000)
    store = open_store(run.store.runs)
    reads: list[tuple[str, int]] = []
    get = type(store).get

    def counted(self: Any, key: str, start: int = 0, stop: int | None = None) -> bytes:
        data: bytes = get(self, key, start, stop)
        reads.append((key, len(data)))
        return data

    monkeypatch.setattr(type(store), "get", counted)
    pages = Pages(OpenedRun(run), None)
    pages.prepare()
    index = index_of(run)
    latent = int(np.argsort(-index.firings)[N // 4])
    pages.latent(latent)  # file footers are cached
    pages.search({"kind": "text", "asked": "abc"})  # the model and the dictionary are cached too

    def bytes_of(folder: str) -> int:
        return sum(size for key, size in reads if f"/{folder}/" in key)

    reads.clear()
    for query in (ListQuery(), ListQuery("effect", effect=1.0), ListQuery("max", 0.1, 1.0, page=1)):
        pages.listed(query)
    pages.search({"kind": "token", "asked": "a"})
    pages.search({"kind": "regex", "asked": "^a"})
    assert reads == []
    pages.search({"kind": "text", "asked": "a text that was pasted"})
    assert not bytes_of("index")
    assert bytes_of("checkpoints") < 20_000  # only a manifest: the dictionary stays in memory
    reads.clear()
    # a latent of other row groups, because the last ones read are cached
    pages.latent((latent + N // 2) % N)
    for table, share in {"latents": 0.05, "examples": 0.05, "pairs": 0.05}.items():
        whole = sum(f.stat().st_size for f in Path(index.place, table).iterdir())
        assert 0 < bytes_of(table) < share * whole
    assert {key.split("/")[2] for key, _ in reads if "/index/" in key} >= {index.manifest.name}


def test_the_list_of_a_wide_index_is_what_its_tables_say(run: Run) -> None:
    """The list is sorted by density over all buckets, although their latents are interleaved."""
    pages, index = Pages(OpenedRun(run), None), index_of(run)
    assert index.manifest.n_buckets > 1
    text = pages.listed(ListQuery(page=3))
    order = np.argsort(-index.firings, kind="stable")[150:200]
    places = [text.index(f'href="/latent/{n}?') for n in order.tolist()]
    assert places == sorted(places)
