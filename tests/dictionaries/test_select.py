"""Selections against a dense stable sort, on adversarial batches.

x is the identity, so the pre-activations are exactly what a case asks for. Shards are row ranges of
W_enc whose keys are merged as in `ShardedAxis.kth_largest`. Ranks that communicate are threads.
"""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from dist_sae.config.sae import BatchTopKConfig
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.recipes.topk import TopK
from dist_sae.dictionaries.selection import kth_largest
from dist_sae.kernels import Kernels, device_select, native, select
from dist_sae.kernels.keys import NO_ENTRY, from_keys, to_keys, to_ordinals
from dist_sae.kernels.select import Block, Candidates
from dist_sae.kernels.torch import KERNELS as TORCH
from tests.dictionaries.ranks import ThreadAxis, on_ranks

ROWS = 8


def random(n: int, *, digits: int | None = None) -> Tensor:
    found = torch.randn(ROWS, n, generator=torch.Generator().manual_seed(n))
    return found if digits is None else found.mul(10**digits).round() / 10**digits


def concentrated(n: int, *, last: bool) -> Tensor:
    """Return a batch whose large values are all in the first or in the last eighth."""
    found, eighth = random(n), max(1, n // 8)
    part = slice(n - eighth, n) if last else slice(eighth)
    found[:, part] += 100.0
    return found


CASES: dict[str, Callable[[int], Tensor]] = {
    "random": random,
    "many ties": lambda n: random(n, digits=0),
    "all equal": lambda n: torch.full((ROWS, n), 0.5),
    "all zero": lambda n: torch.zeros(ROWS, n),
    "none positive": lambda n: -random(n).abs() - 0.1,
    "two positive": lambda n: (
        random(n).abs().neg().index_fill(1, torch.tensor([n // 2, n - 1]), 1.0)
    ),
    "all in the first part": lambda n: concentrated(n, last=False),
    "all in the last part": lambda n: concentrated(n, last=True),
    "ascending": lambda n: torch.arange(float(n)).expand(ROWS, n).clone(),
    "descending": lambda n: -torch.arange(float(n)).expand(ROWS, n).clone(),
    "one group is all": lambda n: (
        torch.where(torch.arange(n) // 16 == n // 32, 7.0, 0.0).expand(ROWS, n).clone()
    ),
}


def oracle(pre_acts: Tensor, k: int, among: Tensor | None = None) -> list[list[int]]:
    """Return the first k latents of a stable descending sort, so ties go to the lower latents."""
    latents = torch.arange(pre_acts.shape[1]) if among is None else among
    order = pre_acts[:, latents].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return [sorted(row) for row in latents[order].tolist()]


@pytest.mark.parametrize("implementation", ["torch", "native"])
def test_the_best_so_far_may_lie_column_by_column(implementation: str) -> None:
    best = torch.full((2, 3), NO_ENTRY, dtype=torch.int64).T
    products = torch.tensor([[1.0, 3.0, 2.0]] * 3)
    found = kernels(implementation).keep_largest(best, products, torch.zeros(3), torch.arange(3))
    latents = from_keys(found)[1].sort().values
    assert latents.tolist() == [[1, 2]] * 3
    assert (best == NO_ENTRY).all()


def kernels(name: str) -> Kernels:
    if name == "native" and (reason := native.available()):
        pytest.skip(reason)
    return native.kernels() if name == "native" else TORCH


def selected(
    pre_acts: Tensor,
    k: int,
    *,
    shards: int = 1,
    among: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    implementation: Kernels = TORCH,
) -> list[list[int]]:
    """Return the latents that `RowTopK` selects shard by shard, after checking the values too."""
    n = pre_acts.shape[1]
    x, W_enc, b_enc = torch.eye(len(pre_acts)), pre_acts.T.contiguous(), torch.zeros(n)
    here, n_local = [], n // shards
    for first in range(0, n, n_local):
        own = slice(first, first + n_local)
        some = (
            None if among is None else among[(among >= first) & (among < first + n_local)] - first
        )
        blocks = select.products(x, W_enc[own], dtype, some)
        part = b_enc[own], min(k, n), implementation
        here.append(select.topk_keys(blocks, len(x), *part, first=first))
    merged = torch.cat(here, 1)
    threshold = merged.topk(min(k, merged.shape[1]), dim=1).values[:, -1]
    found: list[list[int]] = [[] for _ in range(len(pre_acts))]
    for shard, keys in enumerate(here):
        values, entries = select.entries_of(keys, threshold, shard * n_local, n_local)
        latents = entries.latents + shard * n_local
        assert torch.equal(values, pre_acts[entries.rows, latents])
        for row, latent in zip(entries.rows.tolist(), latents.tolist(), strict=True):
            found[row].append(latent)
    return [sorted(row) for row in found]


@pytest.mark.parametrize("implementation", ["torch", "native"])
@pytest.mark.parametrize("chunk", [16, 48, 10_000])
@pytest.mark.parametrize("case", CASES)
def test_topk_is_the_stable_sorts(
    case: str, chunk: int, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The selection matches the sort for widths that do and do not fill groups and chunks."""
    monkeypatch.setattr(select, "CHUNK_LATENTS", chunk)
    for n in (4, 60, 100, 256):
        pre_acts = CASES[case](n)
        for k in (1, 5, 16):
            for shards in (1, 2, 4):
                found = selected(pre_acts, k, shards=shards, implementation=kernels(implementation))
                assert found == oracle(pre_acts, k), (n, k, shards)


@pytest.mark.parametrize("implementation", ["torch", "native"])
@pytest.mark.parametrize("case", CASES)
def test_topk_among_some_is_the_stable_sorts(
    case: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A selection among some latents, as AuxK makes among dead ones, matches the sort.

    The subsets include none of a shard's latents, fewer than k, and all latents.
    """
    monkeypatch.setattr(select, "CHUNK_LATENTS", 48)
    n = 256
    pre_acts = CASES[case](n)
    generator = torch.Generator().manual_seed(0)
    some = torch.randperm(n, generator=generator)
    choices = [some[:m].sort().values for m in (0, 1, 4, 30, 200, n)]
    choices += [torch.arange(64, 128), torch.arange(200, 256)]
    for among in choices:
        for k in (3, 7):
            for shards in (1, 2, 4):
                found = selected(
                    pre_acts, k, shards=shards, among=among, implementation=kernels(implementation)
                )
                assert found == oracle(pre_acts, k, among), (len(among), k, shards)


@pytest.mark.parametrize("implementation", ["torch", "native"])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_ties_of_bf16_across_chunks_go_to_the_lower_latent(
    shards: int, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ties between bf16 values go to the lower latent, even across chunks.

    bf16 has 8 bits, so 512 values from 1 to 2 take at most 129 distinct values.
    """
    monkeypatch.setattr(select, "CHUNK_LATENTS", 32)
    pre_acts = (1 + torch.rand(ROWS, 512, generator=torch.Generator().manual_seed(1))).bfloat16()
    assert all(len(row.unique()) < 130 for row in pre_acts)
    for k in (1, 4, 9, 16, 40):
        found = selected(
            pre_acts.float(),
            k,
            shards=shards,
            dtype=torch.bfloat16,
            implementation=kernels(implementation),
        )
        assert found == oracle(pre_acts.float(), k)


@pytest.mark.parametrize("implementation", ["torch", "native"])
@pytest.mark.parametrize("n", [6, 80])
def test_minus_zero_is_zero(n: int, implementation: str) -> None:
    """-0 ties with 0.

    -0 is passed in as a product, because a sum of products is -0 only if all of them are.
    """
    products = torch.zeros(1, n)
    products[0, ::2] = -0.0
    assert products.signbit().any()
    best = torch.full((1, 2), NO_ENTRY)
    bias = torch.full((n,), -0.0)
    best = kernels(implementation).keep_largest(best, products, bias, torch.arange(n))
    values, latents = from_keys(best)
    assert sorted(latents[0].tolist()) == [0, 1]
    assert not values.any()


def test_keys_have_the_order_of_values_and_the_other_of_latents() -> None:
    tiny = torch.finfo(torch.float32).tiny
    up = [tiny, 1.0, 1.0000001, 3.5, torch.inf]
    values = torch.tensor([-value for value in reversed(up)] + [0.0, *up])
    keys = to_keys(values[:, None], torch.tensor([2**32 - 2, 7, 0]))
    flat = keys.flatten()
    assert torch.equal(flat.sort().values, flat)
    assert int(flat[0]) > NO_ENTRY
    back, latents = from_keys(keys)
    assert torch.equal(back, values[:, None].expand(11, 3))
    assert torch.equal(latents, torch.tensor([2**32 - 2, 7, 0]).expand(11, 3))


# BatchTopK: the largest of the whole batch


def _largest(kernels: str) -> Callable[..., Candidates]:
    return partial(select.largest, kernels=TORCH if kernels == "torch" else native.kernels())


@pytest.mark.parametrize("largest", [_largest("torch"), _largest("native"), device_select.largest])
@pytest.mark.parametrize("block_rows", [3, ROWS])
@pytest.mark.parametrize("chunk", [16, 48, 10_000])
@pytest.mark.parametrize("case", CASES)
def test_the_largest_of_a_batch_are_all_there(
    case: str,
    chunk: int,
    block_rows: int,
    largest: Callable[..., Candidates | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The candidates include the batch's largest values, and among ties the lowest latents."""
    monkeypatch.setattr(select, "CHUNK_LATENTS", chunk)
    for n in (4, 60, 256):
        pre_acts = CASES[case](n)
        monkeypatch.setattr(select, "CHUNK_BYTES", 4 * min(chunk, n) * block_rows)
        for count in (1, 5, 40, ROWS * n):
            blocks = select.products(torch.eye(ROWS), pre_acts.T.contiguous(), torch.float32)
            found = largest(blocks, torch.zeros(n), count)
            assert found is not None
            assert torch.equal(found.values, pre_acts[found.rows, found.latents])
            there = set(zip(found.latents.tolist(), found.rows.tolist(), strict=True))
            assert len(there) == len(found.values)
            flat = pre_acts.T.flatten()  # by latent, then by row
            order = flat.sort(descending=True, stable=True).indices[:count]
            wanted = [divmod(i, ROWS) for i in order.tolist() if flat[i] > 0]
            assert there.issuperset(wanted), (n, count)


def test_of_a_multiple_of_sixteen_rows_no_few_are_left_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The blocks of a multiple of 16 rows leave no small remainder.

    Products of few rows round differently, and shards have blocks of different heights.
    """
    monkeypatch.setattr(select, "CHUNK_BYTES", 4 * 30 * 20)
    for n, heights in ((30, [16, 16, 16]), (15, [32, 16]), (60, [10, 10, 10, 10, 8])):
        blocks = select.products(torch.zeros(48, 5), torch.zeros(n, 5), torch.float32)
        assert [len(block.products) for block in blocks] == heights


def test_the_queued_selection_of_all_above_their_bound_is_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(select, "CHUNK_LATENTS", 48)
    monkeypatch.setattr(select, "CHUNK_BYTES", 4 * 48 * 3)
    monkeypatch.setattr(device_select, "MIN_ROOM", 0)
    for make in CASES.values():
        W_enc, bound = make(340).T.contiguous(), torch.linspace(-1, 1, 340)
        given = torch.zeros(340), bound
        blocks = select.products(torch.eye(ROWS), W_enc, torch.float32)
        wanted = select.above(blocks, *given, TORCH)
        assert wanted is not None
        for limit in (len(wanted.values), len(wanted.values) - 1):
            again = partial(select.products, torch.eye(ROWS), W_enc, torch.float32)
            for share in (0.5, 0.01, None):
                found = device_select.above(
                    again, *given, size=ROWS * 340, share=share, limit=limit
                )
                if limit < len(wanted.values):
                    assert found is None
                else:
                    assert found is not None
                    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 63, 64, 200, 1000])
def test_native_finds_what_torch_finds_above_bounds(n: int, dtype: torch.dtype) -> None:
    """C++ returns the same entries as torch, in the same order.

    Products that equal their bound and NaN products are not returned. Infinite bounds select none
    or all.
    """
    generator = torch.Generator().manual_seed(n)
    products = torch.randn(37, n, generator=generator).to(dtype)
    products[3] = float("nan")
    products[5, ::2] = float("inf")
    products[7] = 0.5
    bias = torch.randn(n, generator=generator) / 8
    bias[0] = 0.0
    some = torch.randn(n, generator=generator) + 2
    for bounds in (some, torch.full((n,), 0.5), torch.full((n,), -torch.inf), torch.inf + some):
        wanted = TORCH.above(products, bias, bounds)
        found = native.above(products, bias, bounds)
        for part, of_torch in zip(found, wanted, strict=True):
            assert part.dtype == of_torch.dtype
            assert torch.equal(part, of_torch)


def test_a_queued_selection_that_does_not_fit_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The queued selection returns None if far more values exceed the bound than expected.

    Here every block has 10,000 values above the bound.
    """
    monkeypatch.setattr(select, "CHUNK_LATENTS", 1000)
    W_enc = torch.arange(1.0, 3001)[:, None].expand(-1, 10).contiguous()

    def blocks() -> Iterator[Block]:
        return select.products(torch.eye(10), W_enc, torch.float32)

    zeros = torch.zeros(3000)
    assert device_select.largest(blocks(), zeros, 10) is None


def _theta(sae: Dictionary) -> float:
    thresholds = sae.inference_thresholds()
    assert thresholds is not None
    return float(thresholds[0])


def batch_oracle(pre_acts: Tensor, count: int) -> set[tuple[int, int]]:
    """Return (row, latent) of the largest positive values, lower latents first, then rows."""
    flat = pre_acts.T.flatten()
    order = flat.sort(descending=True, stable=True).indices[:count].tolist()
    return {(i % len(pre_acts), i // len(pre_acts)) for i in order if flat[i] > 0}


@pytest.mark.parametrize(("replicas", "shards"), [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (4, 1)])
@pytest.mark.parametrize("case", CASES)
def test_batchtopk_selects_the_largest_of_all_ranks(
    case: str, replicas: int, shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "CHUNK_LATENTS", 48)
    n, per_replica = 120, ROWS // replicas
    pre_acts = CASES[case](n)
    for k in (1, 3, 16):

        def on_rank(axis: ThreadAxis, k: int = k) -> tuple[set[tuple[int, int]], float]:
            sae = TopK(BatchTopKConfig(n_latents=n, k=k, auxk=0), ROWS, axis)
            own = slice(sae.first_latent, sae.first_latent + len(sae.W_enc))
            with torch.no_grad():
                sae.W_enc.copy_(pre_acts.T[own])
            first = axis.replica * per_replica
            products = sae.products(torch.eye(ROWS)[first : first + per_replica], torch.float32)
            values, entries = sae.selection.select(products, k)
            rows, latents = entries.rows + first, entries.latents + sae.first_latent
            assert torch.equal(values, pre_acts[rows, latents])
            return set(zip(rows.tolist(), latents.tolist(), strict=True)), _theta(sae)

        ranks = on_ranks(replicas, shards, on_rank)
        expected = batch_oracle(pre_acts, k * ROWS)
        assert sum(len(found) for found, _ in ranks) == len(expected)
        assert set().union(*(found for found, _ in ranks)) == expected
        least = min((pre_acts[entry].item() for entry in expected), default=0.0)
        assert [theta for _, theta in ranks] == [pytest.approx(least)] * len(ranks)


NUMBERS: dict[str, Callable[[torch.Generator], Tensor]] = {
    "random, 32 bits": lambda g: torch.randint(-(2**31), 2**31, (500,), generator=g),
    "random, 64 bits": lambda g: torch.randint(-(2**62), 2**62, (500,), generator=g) * 2 + 1,
    "negative": lambda g: -torch.randint(1, 2**40, (500,), generator=g),
    "ties": lambda g: torch.randint(-3, 3, (500,), generator=g),
    "equal": lambda _: torch.full((500,), -7),
    "low digits only": lambda g: torch.randint(0, 2**16, (500,), generator=g) + 2**31 * 5,
    "ends": lambda _: torch.tensor([2**63 - 1, -(2**63) + 1, 0, -1, 1, 2**16, -(2**16)]),
    "of values": lambda g: to_ordinals(torch.randn(500, generator=g)),
}


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("numbers", NUMBERS)
def test_the_kth_largest_by_radix_is_the_sorts(numbers: str, ranks: int) -> None:
    values = NUMBERS[numbers](torch.Generator().manual_seed(3))
    descending = values.sort(descending=True).values
    small = bool((values >= -(2**31)).all() and (values < 2**31).all())
    # the last rank has three numbers, the first has the rest, and a rank in between has none
    last = values[len(values) - 3 :]
    shares = {1: [values], 2: [values[:-3], last], 3: [values[:-3], values[:0], last]}[ranks]
    for bits in (32, 64) if small else (64,):
        for k in sorted({1, 2, len(values) // 2, len(values) - 1, len(values)}):

            def on_rank(axis: ThreadAxis, k: int = k, bits: int = bits) -> tuple[Tensor, Tensor]:
                return kth_largest(axis, shares[axis.replica], torch.tensor(k), bits=bits)

            found = on_ranks(ranks, 1, on_rank)
            wanted = descending[k - 1]
            for kth, before in found:
                assert int(kth) == int(wanted)
                assert before == int((values > wanted).sum())


def test_a_gpu_takes_larger_blocks() -> None:
    on_cpu, on_gpu = (select.block_size(512, torch.device(kind)) for kind in ("cpu", "cuda"))
    assert on_cpu == 512
    assert on_gpu > on_cpu
