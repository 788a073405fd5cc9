"""Measure the cost of analyses on made-up indexes: `python -m tests.analysis.scale map 100000`.

Latents form families of 25 with similar directions. On each row, two families fire, each with 12 of
its latents. There are as many rows as latents, so each latent fires about 24 times and has links to
its family.
"""

import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from dist_sae.analysis.indexed_run import IndexedDictionary
from dist_sae.analysis.manifolds import Settings as ManifoldSettings
from dist_sae.analysis.manifolds import find_manifolds
from dist_sae.analysis.map import Settings as MapSettings
from dist_sae.analysis.map import make_map
from dist_sae.analysis.names import token_names
from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.index.decoder import Decoder
from dist_sae.index.neighbours import Neighbours
from dist_sae.index.query import Index
from dist_sae.storage import open_store
from tests.analysis import simulated
from tests.analysis.simulated import Codes, simulate

D, FAMILY, ACTIVE, PER_ROW = 256, 25, 12, 2


def make(folder: Path, n: int) -> None:
    """Write an index of n latents (a multiple of 25) and n rows."""
    draw = np.random.default_rng(0)
    families = n // FAMILY
    directions = draw.standard_normal((families, 1, D), np.float32)
    directions = directions + 0.5 * draw.standard_normal((families, FAMILY, D), np.float32)
    directions /= np.linalg.norm(directions, axis=2, keepdims=True)
    family = draw.integers(0, families, (n, PER_ROW))
    family[:, 1] = (family[:, 0] + 1 + draw.integers(0, families - 1, n)) % families
    order = np.argsort(draw.random((n, PER_ROW, FAMILY), np.float32), axis=2)[:, :, :ACTIVE]
    latents = (FAMILY * family[:, :, None] + order).reshape(n, -1)
    rows = np.repeat(np.arange(n), latents.shape[1])
    acts = draw.random(len(rows)) + 0.5
    simulated.neighbours = _of_families(directions)  # type: ignore[attr-defined]
    codes = Codes(rows, latents.ravel(), acts)
    simulate(folder, cast(Any, directions.reshape(n, D)), codes, n_rows=n)  # in fp32


def opened(folder: Path) -> IndexedDictionary:
    """Open the index that `make` wrote."""
    store = open_store(str(folder))
    decoder = Decoder(Checkpoints(store, "world", 1).open(1))
    return IndexedDictionary(Index(store, "world", "made-up"), decoder, token_names(None))


def _of_families(directions: NDArray[np.float32]) -> Any:
    def found(_: Any, latents: range, m: int) -> Neighbours:
        numbers = np.arange(latents.start, latents.stop)
        cosines = np.einsum(
            "nd,nkd->nk", directions.reshape(-1, D)[numbers], directions[numbers // FAMILY]
        )
        others = numbers[:, None] // FAMILY * FAMILY + np.arange(FAMILY)
        cosines[others == numbers[:, None]] = -2
        order = np.argsort(-cosines, axis=1)[:, : min(m, FAMILY - 1)]
        near = (np.take_along_axis(each, order, 1) for each in (others, cosines))
        return Neighbours(*(torch.from_numpy(each) for each in near))

    return found


def main(what: str, n: int) -> None:
    """Write an index in a separate process, then measure an analysis in this one."""
    with tempfile.TemporaryDirectory() as folder:
        process = multiprocessing.get_context("spawn").Process(
            target=make, args=(Path(folder), n // FAMILY * FAMILY)
        )
        process.start()
        process.join()
        dictionary = opened(Path(folder))
        began = time.process_time()
        if what == "map":
            found = make_map("made-up", dictionary, MapSettings(resamples=1))
        else:
            found = find_manifolds(dictionary, ManifoldSettings())
        seconds = time.process_time() - began
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        numbers = {k: v for k, v in found.numbers.items() if isinstance(v, int)}
        sys.stdout.write(f"{what} {n:,}: {seconds:.1f} CPU s, {most / 1e6:.2f} GB; {numbers}\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
