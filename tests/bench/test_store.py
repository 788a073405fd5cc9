"""`dist-sae bench store` on a folder and on an S3 server, and that it cleans up."""

import json
from pathlib import Path

import pytest

from dist_sae.bench import store as bench
from dist_sae.bench.store import StoreShape, bench_run, bench_store
from tests.conftest import Bucket
from tests.launch import run

pytestmark = pytest.mark.system

SHAPE = StoreShape(
    d_in=8,
    units=4,
    unit_rows=1024,
    block_rows=256,
    dtype="bf16",
    batch=256,
    streams=2,
    window_units=2,
)
SMALL = (
    *("--d-in", "8", "--units", "4", "--unit-rows", "1024", "--block-rows", "256"),
    *("--batch", "256", "--streams", "2", "--window-units", "2", "--rounds", "3"),
)


def test_bench_store_measures_a_folder_and_leaves_what_was_there(tmp_path: Path) -> None:
    other = tmp_path / "plan.json"
    other.write_text("of somebody else")
    out = run("bench", "store", "--url", str(tmp_path), *SMALL, "--json")
    result = json.loads(out.splitlines()[-1])
    assert [*tmp_path.rglob("*")] == [other]
    # 4 units of 1,024 rows; a row is 8 values of 2 bytes, token and position (4 + 4), document (8)
    assert result["payload_bytes"] == 4 * 1024 * (8 * 2 + 16)
    stored = result["tar_bytes"] + result["metadata_bytes"]
    assert result["overhead"] == stored / result["payload_bytes"] - 1
    # the overhead is at least two tar headers of 512 bytes per block, with four blocks per unit
    assert result["tar_bytes"] > result["payload_bytes"] + 4 * 2 * 2 * 512
    for way in ("write", "read"):
        assert 0 < result[f"{way}_ratio_low"] <= result[f"{way}_ratio"]
        assert result[f"{way}_ratio"] <= result[f"{way}_ratio_high"]
        assert result[f"{way}_rows_per_second"] == 4 * 1024 / result[f"{way}_seconds"]


def test_bench_store_measures_an_s3_server_and_leaves_what_was_there(bucket: Bucket) -> None:
    bucket.client.put_object(Bucket=bucket.name, Key="a/plan.json", Body=b"of somebody else")
    made = bench_run(SHAPE, f"s3://{bucket.name}/a", bucket.endpoint_url)
    result = bench_store(made, SHAPE, rounds=1, cached=False)
    assert result["write_ratio"] == result["write_raw_seconds"] / result["write_seconds"]
    assert result["read_ratio"] == result["read_raw_seconds"] / result["read_seconds"]
    keys = bucket.client.list_objects_v2(Bucket=bucket.name)["Contents"]
    assert [entry["Key"] for entry in keys] == ["a/plan.json"]


def test_both_ways_of_a_pair_move_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raw reads fetch every block once, and raw writes store the same tars byte by byte."""
    read: list[int] = []
    written: list[bytes] = []
    get, put = bench.RawFolder.get, bench.RawFolder.put

    def counted_get(self: bench.RawFolder, key: str, start: int, stop: int) -> bytes:
        data = get(self, key, start, stop)
        read.append(len(data))
        return data

    def kept_put(self: bench.RawFolder, key: str, data: bytes) -> None:
        put(self, key, data)
        (path,) = tmp_path.rglob(key)
        written.append(path.read_bytes())
        assert written[-1] in [shard.read_bytes() for shard in tmp_path.glob("*/shards/*/*.tar")]

    monkeypatch.setattr(bench.RawFolder, "get", counted_get)
    monkeypatch.setattr(bench.RawFolder, "put", kept_put)
    monkeypatch.setattr(bench, "WRITE_BYTES", 1000)  # so that there are several parts
    bench_store(bench_run(SHAPE, str(tmp_path), None), SHAPE, rounds=1, cached=True)
    assert len(written) == 4
    assert len(read) == 2 * 4 * 4  # one warm-up and one round; four blocks per unit
    assert sum(read) >= 2 * 4 * 1024 * (8 * 2 + 16)


def test_a_failure_leaves_nothing_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.RawFolder, "get", fail)
    made = bench_run(SHAPE, str(tmp_path / "set"), None)
    with pytest.raises(KeyboardInterrupt):
        bench_store(made, SHAPE, rounds=1, cached=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["set"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--units", "3"), "bench store: --units 3 is not a multiple of --streams 2"),
        (("--units", "0"), "bench store: --units 0 is not a multiple of --streams 2"),
        (
            ("--batch", "768"),
            "bench store: --batch 768 does not divide the rows of all units, 4096",
        ),
        (
            ("--endpoint-url", "host:1"),
            "bench store: store.s3.endpoint_url: host:1 has no scheme: "
            "write http://host:port or https://host",
        ),
    ],
)
def test_bench_store_refuses_in_one_line_what_cannot_be(
    tmp_path: Path, options: tuple[str, ...], problem: str
) -> None:
    said = run("bench", "store", "--url", str(tmp_path), *SMALL, *options, code=2)
    assert said.startswith(f"error: {problem}")
    assert len(said.splitlines()) == 1
    assert not [*tmp_path.iterdir()]
