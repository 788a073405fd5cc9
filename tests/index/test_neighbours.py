"""Nearest latents against brute force in fp64: in ranges, with cells, and in bounded memory."""

import itertools
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_sae.checkpoint import layout
from dist_sae.checkpoint.layout import Checkpoint, Checkpoints
from dist_sae.index import cells as cells_module
from dist_sae.index import neighbours as neighbours_module
from dist_sae.index.cells import Cells, compute_cells, load_or_compute_cells
from dist_sae.index.decoder import Decoder
from dist_sae.index.neighbours import Neighbours, neighbours
from dist_sae.kernels import select
from dist_sae.storage import open_store
from tests.memory import MIB, peak_bytes
from tests.world import save

N, D, M = 700, 24, 8


def checkpoint(folder: Path, W_dec: torch.Tensor) -> Checkpoint:
    checkpoints = Checkpoints(open_store(str(folder)), "run", 1)
    tensors = {"W_enc": W_dec[:, :1], "W_dec": W_dec, "b_dec": torch.zeros(W_dec.shape[1])}
    save(checkpoints, 1, tensors, {})
    return checkpoints.open(1)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "PART_BYTES", 64 * D * 4)


def planted(n: int = N, d: int = D, seed: int = 0) -> torch.Tensor:
    """Return decoder rows of various lengths: random ones, clusters and near duplicates.

    Near duplicates have cosines of .9 to .999.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator)
    rows[: n // 3] = rows[torch.arange(n // 3) % 20] + 0.7 * rows[: n // 3]
    source = torch.randint(0, n, (n // 10,), generator=generator)
    noise = torch.randn(n // 10, d, generator=generator) / d**0.5
    share = torch.linspace(0.05, 0.45, n // 10)[:, None]
    rows[-(n // 10) :] = rows[source] + share * rows[source].norm(dim=1, keepdim=True) * noise
    rows = rows[torch.randperm(n, generator=generator)]
    return rows * torch.rand(n, 1, generator=generator)


def brute_force(W_dec: torch.Tensor, m: int) -> Neighbours:
    """Return the nearest latents by cosines in fp64, rounded to fp32.

    Ties go to the lower latent.
    """
    rows = W_dec.double().numpy()
    norms = np.linalg.norm(rows, axis=1)
    cosines = (rows @ rows.T) / np.maximum(np.outer(norms, norms), 1e-300)
    # values that differ only by fp64 rounding are ties
    cosines = np.round(cosines, 9).astype(np.float32)
    np.fill_diagonal(cosines, -np.inf)
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :m]
    nearest = np.take_along_axis(cosines, order, 1)
    return Neighbours(torch.from_numpy(order).int(), torch.from_numpy(nearest))


def assert_same(found: Neighbours, expected: Neighbours) -> None:
    torch.testing.assert_close(found.cosines, expected.cosines, rtol=0, atol=1e-7)
    assert torch.equal(found.latents, expected.latents)
    assert found.latents.dtype == torch.int32


def test_nearest_latents_are_those_of_all_pairs(tmp_path: Path) -> None:
    W_dec = planted()
    assert_same(neighbours(checkpoint(tmp_path, W_dec), range(N), M), brute_force(W_dec, M))


def test_the_running_mean_is_looked_at_where_there_is_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(open_store(str(tmp_path)), "run", 1)
    W_dec, mean = planted(seed=1), planted(seed=2)
    save(checkpoints, 1, {"W_dec": W_dec, "ema.W_dec": mean}, {})
    assert_same(neighbours(checkpoints.open(1), range(N), M), brute_force(mean, M))


def test_of_equal_ones_the_lower_is_nearer(tmp_path: Path) -> None:
    """Among equally near latents, the one with the lower number comes first.

    Ten latents have the same direction, with lengths that fp32 multiplies exactly.
    """
    W_dec = planted()
    same = [5, 9, 70, 71, 130, 250, 251, 400, 640, 699]
    W_dec[same] = W_dec[5] * 2.0 ** torch.arange(len(same))[:, None]
    found = neighbours(checkpoint(tmp_path, W_dec), range(N), 7)
    for latent in same:
        others = [other for other in same if other != latent]
        assert found.latents[latent].tolist() == others[:7]
        assert found.cosines[latent].tolist() == [1.0] * 7


def test_rows_of_zeros_have_cosines_of_zero(tmp_path: Path) -> None:
    W_dec = planted()
    W_dec[[0, 3, 300]] = 0
    given = checkpoint(tmp_path, W_dec)
    found = neighbours(given, range(N), M)
    assert_same(found, brute_force(W_dec, M))
    assert found.latents[3].tolist() == [0, 1, 2, 4, 5, 6, 7, 8]
    assert found.cosines[3].tolist() == [0.0] * M
    in_cells = neighbours(given, range(N), M, compute_cells(given))
    assert not in_cells.cosines.isnan().any()
    assert torch.equal(in_cells.cosines[3], torch.zeros(M))


@pytest.mark.parametrize("n", [1, 2, M])
def test_where_there_are_few_the_rest_is_none(tmp_path: Path, n: int) -> None:
    W_dec = planted()[:n]
    found = neighbours(checkpoint(tmp_path, W_dec), range(n), M)
    assert_same(Neighbours(*(part[:, : n - 1] for part in found)), brute_force(W_dec, n - 1))
    assert found.latents.shape == (n, M)
    assert (found.latents[:, n - 1 :] == -1).all()
    assert (found.cosines[:, n - 1 :] == 0).all()


@pytest.mark.parametrize("in_cells", [False, True])
def test_ranges_are_the_whole_whoever_computes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, in_cells: bool
) -> None:
    monkeypatch.setattr(cells_module, "PROBES", 4)
    monkeypatch.setattr(neighbours_module, "WINDOW_BYTES", 150 * D * 4)
    monkeypatch.setattr(neighbours_module, "PAIRS_BYTES", 50 * D * 8)
    given = checkpoint(tmp_path, planted())
    cells = compute_cells(given) if in_cells else None
    whole = neighbours(given, range(N), M, cells)
    monkeypatch.setattr(neighbours_module, "QUERIES_BYTES", 90 * D * 4)
    kept = Decoder(given, cache_bytes=N * D * 4)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        cuts = [0, 1, 64, 200, 201, 650, N]
        parts = [
            neighbours(given, range(start, stop), M, cells, decoder=kept)
            for start, stop in itertools.pairwise(cuts)
        ]
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(whole, map(torch.cat, zip(*parts, strict=True)), strict=True):
        assert torch.equal(one, other)


def test_cells_find_nearly_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a quarter of the cells, over .9 of neighbors and .99 of near duplicates are found."""
    n = 2048
    W_dec = planted(n)
    given = checkpoint(tmp_path, W_dec)
    cells = compute_cells(given)
    assert len(cells.centroids) == 128
    monkeypatch.setattr(cells_module, "PROBES", 32)
    found, expected = neighbours(given, range(n), 16, cells), brute_force(W_dec, 16)
    hits = (expected.latents[:, :, None] == found.latents[:, None, :]).any(2)
    assert hits.double().mean() > 0.9
    assert hits[expected.cosines > 0.9].double().mean() > 0.99
    torch.testing.assert_close(found.cosines[:, 0], expected.cosines[:, 0], rtol=0, atol=0.2)
    monkeypatch.setattr(cells_module, "PROBES", 128)
    assert_same(neighbours(given, range(n), 16, cells), expected)


def test_a_latent_is_in_the_cell_of_the_nearest_centroid(tmp_path: Path) -> None:
    W_dec = planted()
    given = checkpoint(tmp_path, W_dec)
    cells, again = compute_cells(given), compute_cells(given)
    assert all(torch.equal(one, other) for one, other in zip(cells, again, strict=True))
    torch.testing.assert_close(cells.centroids.norm(dim=1), torch.ones(len(cells.centroids)))
    products = torch.nn.functional.normalize(W_dec, dim=1) @ cells.centroids.T
    own = products.gather(1, cells.cell_of[:, None].long())[:, 0]
    torch.testing.assert_close(own, products.amax(1))


def same_cells(one: Cells | None, other: Cells | None) -> bool:
    assert one is not None
    assert other is not None
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_cells_are_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Cells are computed once, unless they are damaged or belong to another checkpoint."""
    given, store = checkpoint(tmp_path, planted()), open_store(str(tmp_path / "index"))
    assert (
        load_or_compute_cells(store, "cells/", given) is None
    )  # so few latents are compared with all others instead
    assert list(store.keys()) == []
    monkeypatch.setattr(cells_module, "EXACT_LATENTS", N - 1)
    first = load_or_compute_cells(store, "cells/", given)
    with monkeypatch.context() as patch:
        patch.setattr(cells_module, "compute_cells", None)
        assert same_cells(first, load_or_compute_cells(store, "cells/", given))
    (data,) = store.keys("cells/cells-")
    store.put(data, store.get(data)[:-1] + b"?")
    with caplog.at_level(logging.WARNING):
        assert same_cells(first, load_or_compute_cells(store, "cells/", given))
    assert "does not match its checksum" in caplog.text
    assert "recomputing the cells" in caplog.text
    store.delete(data)
    assert same_cells(first, load_or_compute_cells(store, "cells/", given))
    other = checkpoint(tmp_path / "other", planted(seed=1))
    found = load_or_compute_cells(store, "cells/", other)
    assert not torch.equal(found.cell_of, first.cell_of)  # type: ignore[union-attr]
    assert same_cells(found, load_or_compute_cells(store, "cells/", other))


def test_all_use_the_cells_that_were_there_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells_module, "EXACT_LATENTS", N - 1)
    given, store = checkpoint(tmp_path, planted()), open_store(str(tmp_path / "index"))
    theirs = compute_cells(given)._replace(cell_of=torch.zeros(N, dtype=torch.int32))

    def slow(*_: object) -> Cells:
        """Compute other cells, after another worker has stored its own cells."""
        monkeypatch.setattr(cells_module, "compute_cells", lambda *_: theirs)
        load_or_compute_cells(store, "cells/", given)
        return theirs._replace(cell_of=torch.ones(N, dtype=torch.int32))

    monkeypatch.setattr(cells_module, "compute_cells", slow)
    assert same_cells(load_or_compute_cells(store, "cells/", given), theirs)


def of_a_range(folder: Path, among: str) -> None:
    """Compute the neighbors of a range of latents, in a separate process."""
    cells_module.SAMPLE_BYTES = neighbours_module.WINDOW_BYTES = 4 * MIB
    neighbours_module.PAIRS_BYTES = neighbours_module.QUERIES_BYTES = MIB
    select.CHUNK_BYTES = 2 * MIB
    given = Checkpoints(open_store(str(folder)), "run", 1).open(1)
    neighbours(given, range(100, 164), 16, compute_cells(given) if among == "cells" else None)


@pytest.mark.system
@pytest.mark.parametrize("among", ["all", "cells"])
def test_memory_does_not_grow_with_the_width(
    tmp_path: Path, among: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peak memory does not grow with the width.

    Decoders of 8 MiB and of 64 MiB are read in parts of 1 MiB.
    """
    monkeypatch.setattr(layout, "PART_BYTES", MIB)
    folders = []
    for n in (1024, 8192, 65_536):
        folders.append(tmp_path / str(n))
        checkpoint(folders[-1], torch.randn(256, generator=torch.Generator()).expand(n, 256))
    tiny, small, large = folders
    peaks = [peak_bytes(of_a_range, (tiny, among), (folder, among)) for folder in (small, large)]
    assert peaks[1] - peaks[0] < 8 * MIB
    assert peaks[1] < 56 * MIB
