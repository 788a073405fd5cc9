"""Runs to browse, and a thread that serves their pages."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dist_sae.browser.pages import Pages
from dist_sae.browser.server import serve
from dist_sae.config import Run
from dist_sae.index.query import Index
from dist_sae.report.map_page import MapPage, render_map
from dist_sae.report.outcome import Findings, store_findings
from dist_sae.storage import open_store
from tests.index.indexed import make_index
from tests.notebook.raw import initialised, language_run, save_dictionary, save_language_model

D_IN = 24
CLUSTERS = {"0": [["a", "b"], ["c"]], "1": [["d"], [" d ", "e"], ["f"]]}
"""For each level, the tokens that name its clusters."""


def place(run: Run) -> str:
    return f"{run.store.runs}/{run.name}"


def indexed_run(folder: Path, d_in: int = D_IN, index: Mapping[str, Any] | None = None) -> Run:
    """Make a run over a tiny language model, with an index of 64 latents."""
    run = language_run(folder, save_language_model(folder / "model", width=d_in))
    run = run.model_copy(update={"index": run.index.model_copy(update=dict(index or {}))})
    save_dictionary(run, initialised(run, d_in, 1), 7)
    make_index(run)
    return run


def sibling_run(run: Run, name: str, seed: int = 2) -> Run:
    """Make another run with an index over the same rows."""
    other = run.model_copy(update={"name": name})
    save_dictionary(other, initialised(other, D_IN, seed), 7)
    make_index(other)
    return other


def index_of(run: Run) -> Index:
    return Index(open_store(run.store.runs), run.name)


def keep_map(run: Run, checkpoint: str | None = None) -> None:
    """Write a result of `analyse map`: latent n < 60 is in clusters n % 2 and n % 3."""
    n = np.arange(64)
    inside = n < 60
    of = {level: n % (int(level) + 2) for level in CLUSTERS}
    places = np.stack([np.cos(n), np.sin(n)], 1)
    table = pa.table(
        {
            "latent": n.astype(np.int32),
            "x": places[:, 0].astype(np.float32),
            "y": places[:, 1].astype(np.float32),
            **{f"cluster_{i}": pa.array(c.astype(np.int32), mask=~inside) for i, c in of.items()},
            "parent": pa.array((n // 2).astype(np.int32), mask=n % 4 > 0),
        }
    )
    lines = [
        {
            "level": int(level),
            "cluster": i,
            "size": int((of[level][inside] == i).sum()),
            "density": 0.5,
            "stability": None if i else 0.75,
            "tokens": tokens,
        }
        for level, names in CLUSTERS.items()
        for i, tokens in enumerate(names)
    ]
    page = MapPage(
        title="Map",
        places=places,
        colour=np.where(inside, of["0"], -1).astype(np.int32),
        density=np.full(64, 0.01),
        parent=np.full(64, -1, np.int32),
        tokens=np.full((64, 1), -1, np.int32),
        token_texts={},
        labels=[[]],
    )
    index = index_of(run)
    store_findings(
        open_store(run.store.runs),
        run.name,
        "map",
        "Map of the latents",
        {run.name: checkpoint or index.manifest.checkpoint},
        {},
        Findings(
            {},
            [],
            tables={"latents": table, "clusters": pa.Table.from_pylist(lines)},
            pages={"map": render_map(page)},
        ),
    )


@contextmanager
def served(pages: Pages, host: str = "127.0.0.1") -> Iterator[tuple[str, int]]:
    """Serve pages. Yields the URL to open and the port."""
    with serve(pages, host, 0) as (server, url):
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield url, server.server_address[1]
        finally:
            server.shutdown()
            thread.join()
