"""Stores behind failing networks and servers: correct bytes or an error, never wrong bytes.

A bit that flips on its way to the reader is left to the layer above, which has the checksums.
"""

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import pytest
import torch

from dist_sae.config.data import S3Config
from dist_sae.data.shard import SiteRows, read_block, write_shard
from dist_sae.storage import ObjectStore, open_store, s3
from dist_sae.storage.records import Record, read_record, seal
from tests.conftest import Bucket
from tests.faults import KINDS, FaultProxy

pytestmark = [pytest.mark.usefixtures("short_pauses"), pytest.mark.system]

HARMLESS_BELOW = sorted(KINDS.keys() - {"flip_get"})
"""Faults that a store corrects or reports itself."""
HEEDS_CHECKSUMS = {"seaweedfs", "rclone"}
"""Servers that compare a PUT with its Content-MD5.

No server compares a PUT with the hash in the signature.
"""


def make_store(bucket: Bucket, proxy: FaultProxy, *, exclusive: bool = True) -> ObjectStore:
    config = S3Config(endpoint_url=proxy.endpoint_url, deadline_seconds=20)
    store = open_store(f"s3://{bucket.name}/p", config)
    # set here, so that the store does not probe the server through the faults
    vars(store)["exclusive"] = exclusive
    return store


def use(store: ObjectStore, worker: int) -> dict[str, bytes]:
    """Write, read, overwrite and delete objects, and return the remaining ones."""
    chance = random.Random(worker)
    left = {}
    for i in range(3):
        key = f"folder/{worker}-{i}"
        first, second = (chance.randbytes(chance.randrange(1, 3000)) for _ in range(2))
        assert store.put(key, first, if_absent=True)
        assert not store.put(key, second, if_absent=True)
        assert store.get(key) == first
        assert store.put(key, second)
        start, stop = sorted(chance.sample(range(3001), 2))
        assert store.get(key, start, stop) == second[start:stop]
        assert store.size(key) == len(second)
        assert store.size(f"{key}-none") is None
        left[key] = second
    gone = f"folder/{worker}-0"
    store.delete(gone)
    assert store.size(gone) is None
    del left[gone]
    return left


def stress(bucket: Bucket, proxy: FaultProxy) -> None:
    """Check that the bucket contains exactly what several concurrent writers wrote."""
    store = make_store(bucket, proxy)
    n_workers = 2
    with ThreadPoolExecutor(n_workers) as pool:
        left = [*pool.map(use, [store] * n_workers, range(n_workers))]
    expected = {key: content for some in left for key, content in some.items()}
    found = {entry.key: entry.bytes for entry in store.entries("folder/")}
    assert found == {key: len(content) for key, content in expected.items()}
    for key, content in expected.items():
        there = bucket.client.get_object(Bucket=bucket.name, Key=f"p/{key}")["Body"].read()
        assert there == content


@pytest.mark.parametrize("fault", HARMLESS_BELOW)
def test_each_fault_alone(
    fault: str, make_bucket: Callable[[str], Bucket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 1000)
    bucket = make_bucket("seaweedfs")
    rates = {fault: 0.5}
    with FaultProxy(bucket.endpoint_url, 1, rates, slow_budget_seconds=1.0) as proxy:
        stress(bucket, proxy)
        assert proxy.injected[fault] >= 10
        assert set(proxy.injected) == {fault}


@pytest.mark.parametrize("kind", ["moto", "seaweedfs"])
def test_all_faults_together(kind: str, make_bucket: Callable[[str], Bucket]) -> None:
    bucket = make_bucket(kind)
    faults = [fault for fault in HARMLESS_BELOW if fault != "flip_put" or kind in HEEDS_CHECKSUMS]
    with FaultProxy(bucket.endpoint_url, 2, dict.fromkeys(faults, 0.1)) as proxy:
        stress(bucket, proxy)
        assert set(proxy.injected) == set(faults)


@pytest.mark.parametrize("kind", sorted(HEEDS_CHECKSUMS))
def test_bit_flipped_on_its_way_to_the_server_is_not_stored(
    kind: str, make_bucket: Callable[[str], Bucket], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = make_bucket(kind)
    content = random.Random(0).randbytes(11 * 2**20)
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)  # the smallest part size that S3 allows
    monkeypatch.setattr(s3, "MULTIPART_FROM_BYTES", 2**20)
    with FaultProxy(bucket.endpoint_url, 3, {"flip_put": 1.0}, most_per_request=2) as proxy:
        store = make_store(bucket, proxy)
        store.put("small", content[:100])
        assert proxy.injected["flip_put"] == 2
        assert store.get("small") == content[:100]
        # not 1.0, because rclone gives up an upload that has a damaged part
        proxy.rates = {"flip_put": 0.5}
        store.put("large", content)
        assert proxy.injected["flip_put"] > 2
        assert store.get("large") == content


@pytest.mark.parametrize("kind", ["moto", "seaweedfs", "rclone"])
def test_large_objects_go_in_parts_through_faults(
    kind: str, make_bucket: Callable[[str], Bucket], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = make_bucket(kind)
    content = random.Random(0).randbytes(11 * 2**20)
    monkeypatch.setattr(s3, "MULTIPART_FROM_BYTES", 2**20)
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    faults = [fault for fault in HARMLESS_BELOW if fault != "flip_put"]
    with FaultProxy(bucket.endpoint_url, 4, dict.fromkeys(faults, 0.1)) as proxy:
        store = make_store(bucket, proxy)
        for i in range(2):
            store.put(f"large-{i}", content)
            assert store.get(f"large-{i}") == content
        assert sum(proxy.injected.values()) > 3


@pytest.mark.parametrize(("kind", "n_keys"), [("moto", 5), ("seaweedfs", 1)])
def test_racing_writers_have_one_winner_whatever_they_hear(
    kind: str, n_keys: int, make_bucket: Callable[[str], Bucket]
) -> None:
    bucket = make_bucket(kind)
    n_writers = 4
    barrier = threading.Barrier(n_writers)
    rates = {"reset_after": 0.3, "error_after": 0.3, "error": 0.1}
    with FaultProxy(bucket.endpoint_url, 5, rates) as proxy:
        store = make_store(bucket, proxy)

        def race(writer: int, key: str) -> bool:
            barrier.wait()
            return store.put(key, b"%d" % writer, if_absent=True)

        for key in map(str, range(n_keys)):
            with ThreadPoolExecutor(n_writers) as pool:
                won = list(pool.map(race, range(n_writers), [key] * n_writers))
            assert sum(won) == 1
            assert store.get(key) == b"%d" % won.index(True)
        assert proxy.injected["reset_after"] + proxy.injected["error_after"] > 0


def test_exclusive_is_found_out_through_faults(make_bucket: Callable[[str], Bucket]) -> None:
    rates = {"reset_after": 0.3, "error_after": 0.2, "error": 0.2, "truncate": 0.3, "shorten": 0.3}
    for kind in ("moto", "rclone"):
        bucket = make_bucket(kind)
        with FaultProxy(bucket.endpoint_url, 6, rates) as proxy:
            for _ in range(3):
                store = make_store(bucket, proxy)
                del vars(store)["exclusive"]
                assert store.exclusive == (kind == "moto")
            assert proxy.injected["reset_after"]


class Note(Record):
    """A small record."""

    schema_version: Literal[1] = 1
    text: str


@pytest.mark.parametrize(
    "rates", [{"flip_get": 1.0}, dict.fromkeys(HARMLESS_BELOW, 0.1) | {"flip_get": 1.0}]
)
def test_bits_flipped_on_their_way_to_the_reader_are_read_again(
    rates: dict[str, float], make_bucket: Callable[[str], Bucket]
) -> None:
    bucket = make_bucket("seaweedfs")
    n_rows = 64
    rows = SiteRows(
        torch.randn(n_rows, 8, generator=torch.Generator().manual_seed(0)),
        *(torch.arange(n_rows) + i for i in range(3)),
    )
    with FaultProxy(bucket.endpoint_url, 7, {}, most_per_request=2) as proxy:
        store = make_store(bucket, proxy)
        note = Note(text="x" * 500)
        store.put("note.json", seal(note))
        shard = write_shard(store, 0, "resid_post.0", rows, 16, "fp32")
        proxy.rates = rates
        assert read_record(Note, store, "note.json") == note
        for number in range(4):
            block = read_block(store, shard, number)
            for got, written in zip(block, rows, strict=True):
                assert torch.equal(got, written[16 * number : 16 * (number + 1)])
        assert proxy.injected["flip_get"] > 0


def test_same_seed_gives_the_same_faults(make_bucket: Callable[[str], Bucket]) -> None:
    bucket = make_bucket("moto")
    rates = dict.fromkeys(["error", "reset", "reset_after", "shorten", "truncate"], 0.15)
    seen = []
    for seed in (1, 1, 2):
        with FaultProxy(bucket.endpoint_url, seed, rates) as proxy:
            store = make_store(bucket, proxy)
            for i in range(8):
                store.put(f"key/{i}", b"content %d" % i)
                assert store.get(f"key/{i}") == b"content %d" % i
            seen.append((proxy.injected, proxy.requests))
    assert seen[0] == seen[1]
    assert seen[0] != seen[2]
