"""Damaged, deleted and empty objects do not affect the rest of an index."""

import errno
import io
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import xxhash

import dist_sae.index.build
import dist_sae.index.layout
import dist_sae.index.merge
import dist_sae.index.tables
from dist_sae.errors import CorruptObjectError, StoreFullError
from dist_sae.index.codes import Codes
from dist_sae.index.layout import CodesChunk, IndexFolder, UnitRecord, index_name, read_manifest
from dist_sae.index.merge import BucketCodes
from dist_sae.index.repair import drop_damaged
from dist_sae.storage import ObjectStore, open_store
from dist_sae.storage.records import seal
from tests.index.indexed import WORLD, add_checkpoint, files, make_index, produced, tables
from tests.index.test_refusals import retire
from tests.world import Wrapped


@pytest.mark.parametrize("damaged", ["latents", "rows", "buckets", "units"])
def test_repair_keeps_what_follows_from_deleted_units(tmp_path: Path, damaged: str) -> None:
    run = produced(tmp_path)
    add_checkpoint(run)
    result = make_index(run)
    folder = Path(result["index"])
    retire(run, below=2)
    path = min(folder.glob(f"{damaged}/*"))
    path.write_bytes(path.read_bytes()[:-9])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(CorruptObjectError, match=r"unit 0 has been deleted \(store.retention\)"):
        make_index(run, repair=True)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.system
@pytest.mark.parametrize("damaged", ["latents", "rows", "examples", "pairs", "postings"])
def test_repair_makes_any_table_again(tmp_path: Path, damaged: str) -> None:
    run = produced(tmp_path)
    add_checkpoint(run)
    result = make_index(run)
    folder = Path(result["index"])
    whole = files(result["index"])
    path = max(folder.glob(f"{damaged}/*"))
    path.write_bytes(path.read_bytes()[:-9])
    assert make_index(run, repair=True) == result
    assert files(result["index"]) == whole


@pytest.mark.system
def test_a_worker_whose_bucket_was_taken_over_encodes_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow worker whose bucket was taken over does not encode any unit again.

    Other workers complete the index and delete the codes before the slow worker reads them.
    """
    run = produced(tmp_path)
    add_checkpoint(run)
    monkeypatch.setattr(dist_sae.index.layout, "LEAST_LATENTS", 24)
    build_bucket = dist_sae.index.tables.build_bucket
    others = list[dict[str, object]]()

    def overtaken(*args: object, **options: object) -> object:
        monkeypatch.undo()
        monkeypatch.setattr(dist_sae.index.layout, "LEAST_LATENTS", 24)
        for claim in Path(run.store.runs).rglob("claims/*/*.json"):
            claim.unlink()  # as if the claims had expired
        others.append(make_index(run, "quick"))
        units.update({p: p.stat().st_mtime_ns for p in Path(run.store.runs).rglob("units/*.json")})
        return build_bucket(*args, **options)  # type: ignore[arg-type]

    units = dict[Path, int]()
    monkeypatch.setattr(dist_sae.index.build, "build_bucket", overtaken)
    assert make_index(run, "slow") == others[0]
    now = {p: p.stat().st_mtime_ns for p in Path(run.store.runs).rglob("units/*.json")}
    assert units == now


def test_a_large_bucket_of_many_units_opens_no_file_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: ObjectStore = open_store(str(tmp_path))
    chunks, n_units = [], 60
    for unit in range(n_units):
        codes = Codes(
            np.array([1, 2], np.int32),
            np.array([unit, 1, 2], np.int32),
            np.array([1, 2, unit + 1], np.float32),
        )
        data = codes.to_bytes()
        store.put(f"{unit}", data)
        chunk = CodesChunk(
            key=f"{unit}",
            first=8,
            groups=2,
            offset=0,
            bytes=len(data),
            entries=3,
            xxh3=xxhash.xxh3_128_hexdigest(data),
        )
        chunks.append((unit, [chunk]))
    monkeypatch.setattr(dist_sae.index.merge, "MOST_ENTRIES", 2 * n_units)
    before = len(os.listdir("/proc/self/fd"))
    bucket = BucketCodes(store, range(8, 10), chunks)
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    tiles = [tile for bounds in bucket.ranges() for tile in bucket.tiles(*bounds)]
    assert [tile.counts.tolist() for tile in tiles] == [[n_units], [2 * n_units]]
    assert tiles[0].rows.tolist() == list(range(n_units))
    assert tiles[1].acts[1::2].tolist() == list(range(1, n_units + 1))


def test_examples_of_a_decile_lie_within_it(tmp_path: Path) -> None:
    run = produced(tmp_path, index={"examples": 6, "decile_examples": 4})
    add_checkpoint(run)
    place = make_index(run)["index"]
    deciles = {line["latent"]: line["deciles"] for line in tables(place, "latents").to_pylist()}
    seen = 0
    for line in tables(place, "examples").to_pylist():
        edges, decile = deciles[line["latent"]], line["decile"]
        if decile >= 0:
            seen += 1
            assert decile == 0 or edges[decile - 1] <= line["act"]
            assert decile == 9 or line["act"] <= edges[decile]
    assert seen > 1000


def test_units_without_a_row_are_indexed(tmp_path: Path) -> None:
    """Units without rows are indexed.

    All rows of a unit may have been excluded, here for their norms.
    """
    world = {**WORLD["activations"], "exclude": {"over_norm": 1e-6}}
    run = produced(tmp_path, activations=world)
    add_checkpoint(run)
    result = make_index(run)
    assert (result["rows"], result["entries"], result["fvu"]) == (0, 0, None)
    latents = tables(result["index"], "latents").to_pylist()
    assert {(line["firings"], line["density"], line["max"]) for line in latents} == {(0, 0.0, 0.0)}


@pytest.mark.system
def test_a_full_temporary_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = produced(tmp_path)
    add_checkpoint(run)

    class Full(io.BytesIO):
        def write(self, _data: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(dist_sae.index.merge, "MOST_ENTRIES", 200)
    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    with pytest.raises(StoreFullError, match=r"bytes of a bucket .*No space left.*TMPDIR"):
        make_index(run)
    monkeypatch.undo()
    make_index(run)


@pytest.mark.parametrize("named", ["world/run.yaml", "world/index/other/rows/0.parquet", "../x"])
def test_a_record_cannot_choose_what_repair_deletes(tmp_path: Path, named: str) -> None:
    """Repair deletes a unit record that names a key outside the index, but not the named object.

    The record has a valid seal, because anyone who can write to the store can seal one.
    """
    run = produced(tmp_path)
    add_checkpoint(run)
    result = make_index(run)
    whole, store = files(result["index"]), open_store(run.store.runs)
    folder = IndexFolder(run.name, index_name(run, result["step"]))
    record = folder.read(store, UnitRecord, 0)
    assert record.origin is not None
    origin = record.origin.model_copy(update={"key": named})
    store.put(folder.units.key(0), seal(record.model_copy(update={"origin": origin})))
    deleted = list[str]()

    class Noted(Wrapped):
        def delete(self, key: str) -> None:
            deleted.append(key)
            super().delete(key)

    faults = drop_damaged(Noted(store), folder, read_manifest(store, folder), 0)
    assert [f"names {named}, which is not in {folder.prefix}" in fault for fault in faults] == [
        True
    ]
    assert {*deleted} == {folder.units.key(0)}
    assert make_index(run) == result
    assert files(result["index"]) == whole
