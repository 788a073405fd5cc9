"""A dictionary read page by page equals the whole one in memory."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dist_sae.checkpoint import pages
from dist_sae.checkpoint.layout import Checkpoint, Checkpoints
from dist_sae.checkpoint.pages import PagedDictionary
from dist_sae.config.dictionary import DictionaryConfig
from dist_sae.dictionaries import build_sae
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.interface import Codes, Rows
from dist_sae.kernels import Entries
from dist_sae.storage import open_store
from tests.dictionaries.recipes import (
    BATCH,
    CONFIGS,
    D_IN,
    N_LATENTS,
    K,
    make,
    relative_error,
    rows,
    widths,
)
from tests.world import save

RECIPES = CONFIGS | {
    "transcoder by batch": CONFIGS["transcoder"].model_copy(update={"selection": "batch"}),
    "routed by batch": CONFIGS["routed"].model_copy(update={"selection": "batch"}),
    "routed to one": CONFIGS["routed"].model_copy(update={"experts_per_row": 1, "experts": 8}),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def saved(folder: Path, sae: Dictionary) -> Checkpoint:
    if "threshold" in dict(sae.named_buffers()):
        sae.get_buffer("threshold").copy_(torch.tensor([0.9, 1.5]))
    checkpoints = Checkpoints(open_store(str(folder)), "run", 1)
    save(checkpoints, 1, dict(sae.tensors()), {})
    return checkpoints.open(1)


def paged(
    checkpoint: Checkpoint, config: DictionaryConfig, latents: int, dtype: torch.dtype
) -> PagedDictionary:
    """Return a dictionary with the given number of latents per page."""
    with torch.device("meta"):
        shape = build_sae(config, widths(config), dtype=dtype)  # type: ignore[arg-type]
    n_bytes = sum(tensor.nbytes for _, tensor in shape.tensors())
    n_bytes = 4 * latents * math.ceil(n_bytes / N_LATENTS)
    return PagedDictionary(config, widths(config), checkpoint, n_bytes, dtype)  # type: ignore[arg-type]


def dense(codes: Codes) -> Tensor:
    """Return codes as a dense matrix, [rows, n_latents]."""
    matrix = torch.zeros(len(codes.starts), N_LATENTS, dtype=codes.acts.dtype)
    entries = Entries(codes.latents, codes.starts, N_LATENTS)
    matrix[entries.rows, codes.latents] = codes.acts
    return matrix


def coded(some: PagedDictionary, x: Tensor) -> Tensor:
    """Return codes from all pages as a dense matrix, [rows, n_latents]."""
    matrix = torch.zeros(len(x), N_LATENTS, dtype=x.dtype)
    for page, here, codes in some.encode_pages(x):
        found = dense(codes)
        latents = page.axis.latents(N_LATENTS)
        matrix[here, latents.start : latents.stop] = found[:, : len(latents)]
    return matrix


@pytest.mark.system
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", RECIPES)
def test_pages_equal_the_whole(
    kind: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages give the same results as the whole dictionary, for 12 latents per page and for 3.

    3 is fewer than k. The rows come in batches of uneven size.
    """
    monkeypatch.setattr(pages, "SLICE_ROWS", BATCH // 3)
    x, config = rows(dtype), RECIPES[kind]
    checkpoint = saved(tmp_path, make(config, dtype))
    whole = paged(checkpoint, config, N_LATENTS, dtype)
    sae = whole.whole()
    assert sae.W_dec.dtype == dtype
    expected, codes = sae.infer(x), dense(sae.encode(x))
    assert torch.equal(whole.infer(x).x_hat, expected.x_hat)
    assert 0 < int(expected.firings.sum()) < BATCH * N_LATENTS
    for latents in (12, 3):
        some = paged(checkpoint, config, latents, dtype)
        assert len(list(some.parts("W_dec"))) > 3
        found, found_codes = some.infer(x), coded(some, x)
        assert torch.equal(found_codes > 0, codes > 0)
        assert relative_error(found_codes, codes) <= TOLERANCE[dtype]
        assert torch.equal(found.firings, expected.firings)
        assert relative_error(found.x_hat, expected.x_hat) <= TOLERANCE[dtype]
        assert torch.equal(torch.cat([part.clone() for part in some.parts("b_enc")]), sae.b_enc)


def test_of_equal_codes_on_several_pages_the_lower_latent_is_kept(tmp_path: Path) -> None:
    """Ties across pages go to the lower latents.

    All latents are equal, so the first k are active on every row where any is.
    """
    sae = make(CONFIGS["topk"], torch.float32)
    with torch.no_grad():
        sae.W_enc.copy_(sae.W_enc[:1].round().expand_as(sae.W_enc))  # so that products are exact
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    some = paged(saved(tmp_path, sae), sae.config, 3, torch.float32)
    x = rows(torch.float32).mul(4).round()
    positive = x @ sae.W_enc[0] > 0
    assert 0 < int(positive.sum()) < BATCH
    expected = positive[:, None] & (torch.arange(N_LATENTS) < K)
    assert torch.equal(coded(some, x) > 0, expected)
    assert torch.equal(some.infer(x).firings, expected.sum(0))


def test_rows_are_grouped_into_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are regrouped in order and without loss, whatever the batch sizes.

    If the whole dictionary is in memory, batches pass through unchanged.
    """
    monkeypatch.setattr(pages, "SLICE_ROWS", 8)
    sae = make(CONFIGS["topk"], torch.float32)
    checkpoint = saved(tmp_path, sae)
    some, whole = (paged(checkpoint, sae.config, n, torch.float32) for n in (4, N_LATENTS))
    x, y = torch.randn(50, D_IN), torch.randn(50, D_IN)
    for sizes in ([50], [1] * 50, [7, 20, 3, 20], [8, 8, 16, 18]):
        for targets in (x, y):
            batches = [
                Rows(part, part if targets is x else other)
                for part, other in zip(torch.split(x, sizes), torch.split(y, sizes), strict=True)
            ]
            turns = [[part.clone() for part in turn] for turn in some.grouped(iter(batches))]
            for joined, expected in zip(zip(*turns, strict=True), (x, targets), strict=True):
                assert torch.equal(torch.cat(joined), expected)
            assert {len(turn[0]) for turn in turns[:-1]} == {8}
            assert all(
                one is other
                for one, other in zip(whole.grouped(iter(batches)), batches, strict=True)
            )


def test_a_page_holds_whole_experts(tmp_path: Path) -> None:
    """A page contains whole experts, however little memory there is."""
    config = CONFIGS["routed"]  # 4 experts
    some = paged(saved(tmp_path, make(config, torch.float32)), config, 1, torch.float32)
    assert [len(part) for part in some.parts("W_dec")] == [16, 16, 16, 16]
