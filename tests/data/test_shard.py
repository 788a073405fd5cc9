import hashlib
import io
import json
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
import webdataset
import xxhash

from dist_sae.data.shard import (
    DTYPES,
    SHARDS,
    SiteRows,
    SiteShard,
    read_acts,
    read_block,
    write_shard,
)
from dist_sae.errors import CorruptObjectError
from dist_sae.storage import ObjectStore, open_store


def random_rows(n: int, d_in: int, dtype: torch.dtype = torch.bfloat16) -> SiteRows:
    generator = torch.Generator().manual_seed(n)
    return SiteRows(
        torch.randn(n, d_in, generator=generator).to(dtype),
        torch.randint(50_000, (n,), generator=generator, dtype=torch.int32),
        torch.randint(256, (n,), generator=generator, dtype=torch.int32),
        torch.randint(2**40, (n,), generator=generator),
    )


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path))


def equal(one: SiteRows, other: SiteRows) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_blocks_hold_the_rows_in_order(store: ObjectStore, dtype: str) -> None:
    rows = random_rows(50, 3, DTYPES[dtype])
    shard = write_shard(store, 7, "resid_post.3", rows, 20, dtype)
    assert [block.rows for block in shard.blocks] == [20, 20, 10]
    assert shard.d_in == 3
    for number in range(3):
        span = torch.arange(20 * number, min(20 * number + 20, 50))
        assert equal(read_block(store, shard, number), rows.take(span))


@pytest.mark.parametrize(
    ("rows", "blocks"),
    [(2047, [512, 512, 512, 511]), (600, [256, 256, 88]), (200, [200]), (9000, [2250] * 4)],
)
def test_a_small_unit_has_four_blocks(store: ObjectStore, rows: int, blocks: list[int]) -> None:
    """A small unit is split into up to four blocks of at least 256 rows.

    The last block may be smaller. Training needs only one block of each unit to begin.
    """
    shard = write_shard(store, 7, "resid_post.3", random_rows(rows, 1), 4096, "bf16")
    assert [block.rows for block in shard.blocks] == blocks
    assert read_block(store, shard, 0).acts.shape == (blocks[0], 1)


def test_plain_webdataset_reads_a_shard(store: ObjectStore, tmp_path: Path) -> None:
    rows = random_rows(50, 3)
    shard = write_shard(store, 7, "resid_post.3", rows, 20, "fp32")
    with warnings.catch_warnings():  # WebDataset does not close its file
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(webdataset.WebDataset(str(tmp_path / shard.key), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"00000007-00000{n}" for n in range(3)]
    assert [json.loads(s["json"]) for s in samples] == [
        {"unit": 7, "rows": n} for n in (20, 20, 10)
    ]
    tensors = [safetensors.torch.load(sample["safetensors"]) for sample in samples]
    for name in ("acts", "tokens", "positions", "documents"):
        assert torch.equal(torch.cat([t[name] for t in tensors]), getattr(rows, name))


def test_the_tar_adds_less_than_one_per_cent(store: ObjectStore) -> None:
    """The tar format adds under 1 % at the default block of 4096 rows x 576 bf16.

    Tokens, positions and documents are counted as payload.
    """
    rows = random_rows(8192, 576, torch.bfloat16)
    shard = write_shard(store, 0, "s", rows, 4096, "bf16")
    payload = sum(column.numel() * column.element_size() for column in rows)
    assert payload < shard.bytes < 1.01 * payload


def test_the_same_rows_give_the_same_bytes(store: ObjectStore) -> None:
    """Two attempts at a unit write the same bytes, but to different keys, so neither overwrites."""
    rows = random_rows(50, 3)
    one = write_shard(store, 7, "s", rows, 20, "fp32")
    other = write_shard(store, 7, "s", SiteRows(*(c.clone() for c in rows)), 20, "fp32")
    assert store.get(one.key) == store.get(other.key)
    assert one.key != other.key
    assert one.model_copy(update={"key": ""}) == other.model_copy(update={"key": ""})


def test_rows_that_are_views_of_a_larger_tensor_are_stored_alone(store: ObjectStore) -> None:
    """A column slice of a larger tensor is stored without the rest of the tensor.

    Such a slice is not contiguous, so safetensors would refuse it or store the whole tensor.
    """
    wide = random_rows(50, 12)
    rows = wide._replace(acts=wide.acts[:, 4:7])
    shard = write_shard(store, 7, "s", rows, 25, "bf16")
    assert equal(read_block(store, shard, 1), rows.take(torch.arange(25, 50)))


def test_checksums_and_sizes_are_those_of_the_bytes(store: ObjectStore) -> None:
    shard = write_shard(store, 7, "s", random_rows(50, 3), 20, "fp32")
    data = store.get(shard.key)
    assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    for block in shard.blocks:
        piece = data[block.offset : block.offset + block.bytes]
        assert xxhash.xxh3_128_hexdigest(piece) == block.xxh3


def test_sums_are_those_of_the_stored_values_in_fp64(store: ObjectStore) -> None:
    """Sums are accumulated in fp64.

    For 999 rows near 100, sums in bf16 would be off by whole units.
    """
    rows = random_rows(999, 4)
    rows = rows._replace(acts=rows.acts + 100)
    shard = write_shard(store, 7, "s", rows, 128, "fp32")
    exact = rows.acts.double()
    torch.testing.assert_close(
        torch.tensor(shard.sum, dtype=torch.float64), exact.sum(0), rtol=1e-14, atol=0
    )
    assert shard.sum_squares == pytest.approx(float((exact**2).sum()), rel=1e-14)


def test_a_unit_that_lost_all_its_rows_can_be_stored(store: ObjectStore) -> None:
    shard = write_shard(store, 7, "s", random_rows(0, 3), 20, "fp32")
    assert (shard.blocks, shard.sum, shard.sum_squares, shard.d_in) == ((), (0, 0, 0), 0, 3)


def damaged(store: ObjectStore, shard: SiteShard, data: bytes) -> None:
    store.put(shard.key, data)


def test_int8_rounds_each_row_to_its_own_scale(store: ObjectStore) -> None:
    """int8 errors are at most half of max|x| / 127, and the levels match those computed by hand."""
    rows = random_rows(50, 8, torch.float32)
    rows.acts[3] = 0
    rows.acts[4] *= 1e4
    rows.acts[5] = torch.tensor([2.0, -2.0, 0.01, 0.0, 1.0, -0.5, 0.005, -0.009])
    shard = write_shard(store, 7, "s", rows, 20, "int8")
    read = [read_block(store, shard, number) for number in range(3)]
    acts = torch.cat([block.acts for block in read])
    level = rows.acts.abs().amax(1, keepdim=True) / 127
    assert ((acts - rows.acts).abs() <= 0.5001 * level).all()
    torch.testing.assert_close(
        acts[5] * 127 / 2, torch.tensor([127.0, -127.0, 1.0, 0.0, 64.0, -32.0, 0.0, -1.0])
    )
    assert torch.equal(torch.cat([block.tokens for block in read]), rows.tokens)
    # the normalizer is measured on the values that readers get
    total = torch.tensor(shard.sum, dtype=torch.float64)
    torch.testing.assert_close(total, acts.double().sum(0), rtol=1e-12, atol=1e-12)


def test_int8_spends_no_levels_on_columns_that_are_always_large(store: ObjectStore) -> None:
    """Columns that are always large cost no int8 levels, because their mean is subtracted.

    The rows have a column near 60, a column near -40, and 62 columns of variance 1. With one scale
    per row, levels are 60 / 127 wide. A uniform error has a twelfth of their square as variance: 64
    (60 / 127)^2 / 12, or .015 of the rows' variance of 63 + 16. For deviations from the mean,
    levels are 2.6 / 127 wide on average, and the error is 3.5e-5.
    """
    rows = random_rows(400, 64, torch.float32)
    rows.acts[:, 3] = 60 + 4 * rows.acts[:, 3]
    rows.acts[:, 9] -= 40
    shard = write_shard(store, 7, "s", rows, 200, "int8")
    acts = torch.cat([read_block(store, shard, number).acts for number in range(2)])
    variance = (rows.acts - rows.acts.mean(0)).square().sum()
    assert float((acts - rows.acts).square().sum() / variance) < 5e-5
    assert torch.equal(read_acts(store, shard, 1), acts[200:])
    exact = acts.double().sum(0)
    total = torch.tensor(shard.sum, dtype=torch.float64)
    torch.testing.assert_close(total, exact, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("place", ["first", "last"])
def test_one_flipped_bit_is_found(store: ObjectStore, place: str) -> None:
    shard = write_shard(store, 7, "s", random_rows(50, 3), 20, "fp32")
    data = bytearray(store.get(shard.key))
    block = shard.blocks[1]
    data[block.offset if place == "first" else block.offset + block.bytes - 1] ^= 1
    damaged(store, shard, bytes(data))
    read_block(store, shard, 0)
    with pytest.raises(CorruptObjectError, match="does not match its checksum") as caught:
        read_block(store, shard, 1)
    assert caught.value.key == shard.key


def test_a_cut_shard_is_found(store: ObjectStore) -> None:
    shard = write_shard(store, 7, "s", random_rows(50, 3), 20, "fp32")
    damaged(store, shard, store.get(shard.key)[: shard.blocks[2].offset + 10])
    with pytest.raises(CorruptObjectError, match="block 2 is truncated"):
        read_block(store, shard, 2)


def test_a_block_is_one_ranged_read(store: ObjectStore) -> None:
    """Reading a block fetches only the bytes of that block."""
    shard = write_shard(store, 7, "s", random_rows(50, 3), 20, "fp32")
    data = store.get(shard.key)
    block = shard.blocks[1]
    zeros = io.BytesIO(bytes(len(data)))
    zeros.seek(block.offset)
    zeros.write(data[block.offset : block.offset + block.bytes])
    damaged(store, shard, zeros.getvalue())  # every byte outside the block is zero
    read_block(store, shard, 1)


@pytest.mark.parametrize("site", ["synthetic", "resid_post.7", "mlp_out.12@other"])
def test_the_key_of_a_shard_tells_site_and_unit(tmp_path: Path, site: str) -> None:
    store = open_store(str(tmp_path))
    rows = SiteRows(torch.ones(2, 3), *(torch.zeros(2, dtype=torch.int64) for _ in range(3)))
    shard = write_shard(store, 17, site, rows, 2, "fp32")
    own = SHARDS.parse(shard.key)
    assert own is not None
    assert (own["site"], own["unit"]) == (site, "00000017")
    assert [key[0] for key in SHARDS.keys(store)] == [shard.key]
