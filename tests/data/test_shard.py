import hashlib
import io
import json
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
import webdataset

from dist_sae.data.shard import Rows, SiteShard, read_block, write_shard
from dist_sae.errors import CorruptObjectError
from dist_sae.storage import ObjectStore, open_store


def random_rows(n: int, d_in: int, dtype: torch.dtype = torch.bfloat16) -> Rows:
    generator = torch.Generator().manual_seed(n)
    return Rows(
        torch.randn(n, d_in, generator=generator).to(dtype),
        torch.randint(50_000, (n,), generator=generator, dtype=torch.int32),
        torch.randint(256, (n,), generator=generator, dtype=torch.int32),
        torch.randint(2**40, (n,), generator=generator),
    )


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path))


def equal(one: Rows, other: Rows) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_blocks_hold_the_rows_in_order(store: ObjectStore, dtype: torch.dtype) -> None:
    rows = random_rows(50, 3, dtype)
    shard = write_shard(store, 7, "resid_post.3", rows, 20)
    assert [block.rows for block in shard.blocks] == [20, 20, 10]
    assert shard.d_in == 3
    for number in range(3):
        span = torch.arange(20 * number, min(20 * number + 20, 50))
        assert equal(read_block(store, shard, number), rows.take(span))


def test_plain_webdataset_reads_a_shard(store: ObjectStore, tmp_path: Path) -> None:
    rows = random_rows(50, 3)
    shard = write_shard(store, 7, "resid_post.3", rows, 20)
    with warnings.catch_warnings():  # WebDataset leaves its file to the garbage collector
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
    """At the default block of 4096 rows x 576 bf16, tokens and places not counted as overhead."""
    rows = random_rows(8192, 576)
    shard = write_shard(store, 0, "s", rows, 4096)
    payload = sum(column.numel() * column.element_size() for column in rows)
    assert payload < shard.bytes < 1.01 * payload


def test_the_same_rows_give_the_same_bytes(store: ObjectStore) -> None:
    """Under different names: attempts never write over each other."""
    rows = random_rows(50, 3)
    one = write_shard(store, 7, "s", rows, 20)
    other = write_shard(store, 7, "s", Rows(*(c.clone() for c in rows)), 20)
    assert store.get(one.key) == store.get(other.key)
    assert one.key != other.key
    assert one.model_copy(update={"key": ""}) == other.model_copy(update={"key": ""})


def test_rows_that_are_views_of_a_larger_tensor_are_stored_alone(store: ObjectStore) -> None:
    """A slice across columns is not contiguous, and safetensors would refuse or store it all."""
    wide = random_rows(50, 12)
    rows = wide._replace(acts=wide.acts[:, 4:7])
    shard = write_shard(store, 7, "s", rows, 25)
    assert equal(read_block(store, shard, 1), rows.take(torch.arange(25, 50)))


def test_checksums_and_sizes_are_those_of_the_bytes(store: ObjectStore) -> None:
    shard = write_shard(store, 7, "s", random_rows(50, 3), 20)
    data = store.get(shard.key)
    assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    for block in shard.blocks:
        piece = data[block.offset : block.offset + block.bytes]
        assert hashlib.sha256(piece).hexdigest() == block.sha256


def test_sums_are_those_of_the_stored_values_in_fp64(store: ObjectStore) -> None:
    """bf16 sums would be off by whole units here: 999 rows about 100."""
    rows = random_rows(999, 4)
    rows = rows._replace(acts=rows.acts + 100)
    shard = write_shard(store, 7, "s", rows, 128)
    exact = rows.acts.double()
    torch.testing.assert_close(
        torch.tensor(shard.sum, dtype=torch.float64), exact.sum(0), rtol=1e-14, atol=0
    )
    assert shard.sum_squares == pytest.approx(float((exact**2).sum()), rel=1e-14)


def test_a_unit_that_lost_all_its_rows_can_be_stored(store: ObjectStore) -> None:
    shard = write_shard(store, 7, "s", random_rows(0, 3), 20)
    assert (shard.blocks, shard.sum, shard.sum_squares, shard.d_in) == ((), (0, 0, 0), 0, 3)


def damaged(store: ObjectStore, shard: SiteShard, data: bytes) -> None:
    store.put(shard.key, data)


@pytest.mark.parametrize("place", ["first", "last"])
def test_one_flipped_bit_is_found(store: ObjectStore, place: str) -> None:
    shard = write_shard(store, 7, "s", random_rows(50, 3), 20)
    data = bytearray(store.get(shard.key))
    block = shard.blocks[1]
    data[block.offset if place == "first" else block.offset + block.bytes - 1] ^= 1
    damaged(store, shard, bytes(data))
    read_block(store, shard, 0)
    with pytest.raises(CorruptObjectError, match="does not match its checksum") as caught:
        read_block(store, shard, 1)
    assert caught.value.key == shard.key


def test_a_cut_shard_is_found(store: ObjectStore) -> None:
    shard = write_shard(store, 7, "s", random_rows(50, 3), 20)
    damaged(store, shard, store.get(shard.key)[: shard.blocks[2].offset + 10])
    with pytest.raises(CorruptObjectError, match="block 2 is cut short"):
        read_block(store, shard, 2)


def test_a_block_is_one_ranged_read(store: ObjectStore) -> None:
    """A reader of one block does not fetch the shard."""
    shard = write_shard(store, 7, "s", random_rows(50, 3), 20)
    data = store.get(shard.key)
    block = shard.blocks[1]
    zeros = io.BytesIO(bytes(len(data)))
    zeros.seek(block.offset)
    zeros.write(data[block.offset : block.offset + block.bytes])
    damaged(store, shard, zeros.getvalue())  # all else is gone
    read_block(store, shard, 1)
