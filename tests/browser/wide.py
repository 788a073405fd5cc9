"""A run with an index of any width, from made-up codes.

As a program, it measures the browser's pages for a run. If the folder has no run, it first makes
one with 1,048,576 latents (docs/measured.md):

    python -m tests.browser.wide RUN|FOLDER
"""

import json
import resource
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import dist_sae.index.build
import dist_sae.index.weights
from dist_sae.browser.pages import Pages
from dist_sae.config import Run
from dist_sae.data.shard import read_block
from dist_sae.index.codes import rounded
from dist_sae.index.context import IndexContext, open_index
from dist_sae.index.encode import Encoded
from dist_sae.index.neighbours import Neighbours
from dist_sae.index.units import unit_record, write_unit
from dist_sae.notebook.run import OpenedRun, open_run
from dist_sae.storage.records import seal
from dist_sae.telemetry.exporter import Telemetry
from tests.browser.served_runs import served
from tests.index.indexed import make_index
from tests.notebook.raw import fill, initialised, save_dictionary, save_language_model
from tests.world import open_activation_set

D_IN = 24  # width of the model
L0 = 24


def make_wide(folder: Path, n_latents: int, documents: int, n_tokens: int) -> Run:
    """Write a run with an index of this width, with texts, output tokens and neighbors.

    Args:
        folder: Folder for the model, the activations and the run.
        n_latents: Number of latents.
        documents: Number of documents, of about 150 rows each.
        n_tokens: Size of the model's vocabulary.
    """
    draw = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(draw.choice(letters, draw.integers(2, 9))) for _ in range(n_tokens)]
    texts = [
        " ".join(words[i] for i in (n_tokens * draw.random(150) ** 3).astype(int))
        for _ in range(documents)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    model = save_language_model(folder / "model", texts=texts, n_tokens=n_tokens)
    run = Run.model_validate(
        {
            "name": "wide",
            "store": {"activations": str(folder / "a"), "runs": str(folder / "r")},
            "model": {"kind": "huggingface", "path": str(model), "dtype": "fp32"},
            "corpus": {"kind": "files", "files": [str(folder / "text.jsonl")]},
            "activations": {
                "sites": ["resid_post.1"],
                "streams": 2,
                "unit_rows": max(1000, documents * 10),
                "context_tokens": 250,
                "heldout_share": 0.1,
                "dtype": "fp32",
                "exclude": {"over_norm": None},
            },
            "sae": {"kind": "topk", "n_latents": n_latents, "k": L0, "auxk": 0, "init": "random"},
            "train": {"rows": 640, "batch_rows": 64},
            "index": {"neighbours": 8, "output_tokens": 5, "pairs": 20_000},
        }
    ).resolved()
    fill(run)
    sae = initialised(run, D_IN, 1)
    save_dictionary(run, sae, 7)
    context = open_index(run, "w", threading.Event(), Telemetry("wide", "index", None), None)
    for encoded in _encoded(run, context):
        store, at, manifest = context.store, context.folder, context.manifest
        written = write_unit(store, at, manifest, sae, encoded)
        store.put(at.units.key(encoded.unit), seal(unit_record(manifest, encoded, [written])))
    with (
        patch.object(dist_sae.index.build, "load_or_compute_cells", lambda *_: None),
        patch.object(dist_sae.index.weights, "neighbours", _neighbours),
    ):
        make_index(run)
    return run


def _encoded(run: Run, context: IndexContext) -> Iterator[Encoded]:
    """Yield units with random codes. Frequencies are proportional to i^(-2/3), in mixed order."""
    activations, n = open_activation_set(run), run.sae.n_latents
    for unit in context.manifest.units:
        shard = activations.manifest(unit).sites[run.site]
        blocks = [read_block(activations.store, shard, i) for i in range(len(shard.blocks))]
        origin = [torch.cat(parts).numpy() for parts in zip(*(b[1:] for b in blocks), strict=True)]
        draw, rows = np.random.default_rng(unit), len(origin[0])
        latents = (n * draw.random((rows, L0)) ** 3).astype(np.int64) * 2_654_435_761 % n
        keys = np.unique(np.arange(rows)[:, None] * n + latents)
        acts = rounded(draw.exponential(1.0, len(keys)).astype(np.float32) + 0.01)
        row, latent = (keys // n).astype(np.int32), (keys % n).astype(np.int32)
        token, position, document = origin
        origins = (token, position, document)
        yield Encoded(unit, origins, (1.0, 4.0, len(keys)), latent, row, acts)


def _neighbours(_: Any, latents: range, m: int, *__: Any) -> Neighbours:
    """Return random neighbors with decreasing cosines."""
    draw = torch.Generator().manual_seed(latents.start)
    n = (len(latents), m)
    return Neighbours(
        torch.randint(latents.start, latents.stop, n, generator=draw).int(),
        torch.rand(n, generator=draw).sort(1, descending=True).values,
    )


def measure(run: Run) -> Iterator[str]:
    """Request pages over HTTP, each once, and yield a line with the times of each kind."""
    draw, n = np.random.default_rng(1), run.sae.n_latents
    started = time.perf_counter()
    pages = Pages(OpenedRun(run), None)
    pages.prepare()
    yield f"prepare: {time.perf_counter() - started:.1f} s"
    letters = "abcdefghijklmnopqrst"
    sorts = ["density", "rarity", "max", "norm", "latent"]
    words = ["".join(draw.choice(list(letters), 5)) for _ in range(400)]
    texts = [f"/search?kind=text&asked={'+'.join(words[i : i + 10])}" for i in range(0, 400, 10)]
    asked = {
        "list, sorted anew": [f"/?sort={sort}" for sort in sorts],
        "list, another page or filter": [
            f"/?sort={sort}&least={least}&page={page}"
            for sort in sorts
            for least, page in ((0, 90), (0.001, 0), (0.01, 20))
        ],
        "latent": [f"/latent/{i}" for i in draw.integers(0, n, 40)],
        "latent of a list": [f"/latent/{i}?sort=max" for i in draw.integers(0, n, 20)],
        "token": [f"/search?kind=token&asked={letter}" for letter in letters],
        "regex": [f"/search?kind=regex&asked=^{letter}" for letter in [*letters[:9], "."]],
        "text of 10 words, the first of them": [texts[0]],
        "the next, which read more of the encoder": texts[1:10],
        "text of 10 words": texts[10:],
    }
    with served(pages) as (url, _):
        for what, places in asked.items():
            times = []
            for each in places:
                started = time.perf_counter()
                with urllib.request.urlopen(url.rstrip("/") + each) as answer:
                    answer.read()
                times.append(1000 * (time.perf_counter() - started))
            yield f"{what}: {np.median(times):.0f} ms ({max(times):.0f} at most, of {len(times)})"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield f"peak memory: {peak / 2**20:.2f} GiB"


def main(folder: Path) -> None:
    run = folder if (folder / "run.yaml").exists() else folder / "r/wide"
    if not run.exists():
        make_wide(folder, 2**20, documents=600, n_tokens=2048)
    for line in measure(open_run(str(run)).config):
        print(line, flush=True)  # noqa: T201 - a program


if __name__ == "__main__":
    main(Path(sys.argv[1]))
