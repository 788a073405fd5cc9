"""Queries of an index, against its tables and against brute force."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

import dist_sae.index.latent_table
import dist_sae.index.layout
import dist_sae.index.merge
import dist_sae.index.tables
from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.config import Run
from dist_sae.config.data import S3Config
from dist_sae.errors import (
    ConfigError,
    CorruptObjectError,
    DistSaeError,
    LatentNotFoundError,
    NoIndexError,
)
from dist_sae.index.layout import TOP, IndexFolder, IndexManifest
from dist_sae.index.query import Index, index_of
from dist_sae.storage import ObjectStore, open_store
from dist_sae.storage.records import read_record, seal
from tests.conftest import Bucket
from tests.index.indexed import Oracle, add_checkpoint, make_index, produced, tables


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use small buckets (two and a part), several row groups, and several pieces of postings."""
    monkeypatch.setattr(dist_sae.index.layout, "LEAST_LATENTS", 24)
    monkeypatch.setattr(dist_sae.index.merge, "MOST_ENTRIES", 700)
    rows = {"latents": 10, "examples": 40, "pairs": 30}
    monkeypatch.setattr(dist_sae.index.tables, "GROUP_ROWS", rows)


def store_of(run: Run) -> ObjectStore:
    return open_store(run.store.runs)


def reads_of(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Return a list that records the key and size of every later read."""
    reads: list[tuple[str, int]] = []
    get = store.get

    def counted(key: str, start: int = 0, stop: int | None = None) -> bytes:
        data = get(key, start, stop)
        reads.append((key, len(data)))
        return data

    monkeypatch.setattr(store, "get", counted)
    return reads


@pytest.mark.system
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("whole_bytes", [0, 2**20])
def test_pages_and_postings_are_what_brute_force_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_bytes: int
) -> None:
    monkeypatch.setattr(dist_sae.index.latent_table, "WHOLE_BYTES", whole_bytes)
    monkeypatch.setattr(dist_sae.index.latent_table, "TAIL_BYTES", 100)  # smaller than any footer
    run = produced(tmp_path)
    sae = add_checkpoint(run)
    oracle = Oracle(run, sae)
    directions = torch.nn.functional.normalize(sae.W_dec.detach().double())
    cosines = (directions @ directions.T).fill_diagonal_(-2)
    place = make_index(run)["index"]
    stored = {name: tables(place, name).to_pylist() for name in ("latents", "examples", "pairs")}
    index = Index(store_of(run), run.name)
    assert index.place == place
    for n in range(64):
        firings = oracle.firings(n)
        page = index.latent(n)
        assert (page.latent, page.firings) == (n, len(firings))
        top = sorted(firings, key=lambda firing: (-firing[0], firing[1]))[:6]
        names = [oracle.names[row] for _, row in top]
        assert [(e.act, e.unit, e.row, e.token) for e in page.largest] == [
            (act, *name[:3]) for (act, _), name in zip(top, names, strict=True)
        ]
        assert page.examples == index.examples(n)
        examples = [row for row in stored["examples"] if row["latent"] == n]
        assert [{"latent": n, **e._asdict()} for e in page.examples] == examples
        pairs = [row for row in stored["pairs"] if row["latent"] == n]
        of_page = [(c.latent, c.rows, c.product, c.phi) for c in page.coactive]
        assert of_page == [(p["other"], p["count"], p["product"], p["phi"]) for p in pairs]
        assert [near.latent for near in page.nearest] == cosines[n].topk(16).indices.tolist()
        assert [near.cosine for near in page.nearest] == pytest.approx(
            cosines[n].topk(16).values.tolist(), abs=1e-6
        )
        assert page.top_tokens == page.bottom_tokens == ()  # a synthetic model has no head
        row = stored["latents"][n]
        for name in ("density", "mean", "max", "decoder_norm", "encoder_norm", "encoder_bias"):
            assert getattr(page, name) == row[name]
        assert list(page.deciles) == row["deciles"]
        assert list(page.histogram) == row["histogram"]
        postings = pa.concat_tables(index.postings(n)).to_pylist()
        assert postings == [
            {"latent": n, "unit": oracle.names[r][0], "row": oracle.names[r][1], "act": act}
            for act, r in firings
        ]
    counts = (oracle.codes > 0).sum(0)
    assert index.firings.tolist() == counts.tolist()
    assert index.denser_than(index.latent(0)) == pytest.approx(np.mean(counts < counts[0]))
    columns = pa.concat_tables(index.latents(["latent", "max"]))
    assert columns.to_pylist() == [
        {"latent": n, "max": max([act for act, _ in oracle.firings(n)], default=0)}
        for n in range(64)
    ]
    assert pa.concat_tables(index.all_examples()).to_pylist() == stored["examples"]
    buckets = range(index.manifest.n_buckets)
    pieces = [piece for bucket in buckets for piece in index.bucket_postings(bucket)]
    assert len(pieces) > len(buckets) > 1
    by_latent = [pa.concat_tables(index.postings(n)) for n in range(64)]
    assert pa.concat_tables(pieces) == pa.concat_tables(by_latent)


@pytest.mark.usefixtures("small")
def test_a_page_reads_only_the_row_groups_of_its_latent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist_sae.index.latent_table, "WHOLE_BYTES", 0)
    monkeypatch.setattr(dist_sae.index.latent_table, "TAIL_BYTES", 10_000)
    run = produced(tmp_path)
    add_checkpoint(run)
    place = Path(make_index(run)["index"])
    store = store_of(run)
    index = Index(store, run.name)
    index.latent(47)  # same bucket, so its footers are now cached
    reads = reads_of(store, monkeypatch)
    index.latent(31)
    found = {key.split("/")[-2] for key, _ in reads}
    assert found == {"latents", "examples", "pairs"}
    spans = len(reads)
    assert spans <= 3 * 3  # a latent's rows may start in one group and end in the next
    for key, size in reads:
        assert size < (place.parents[2] / key).stat().st_size / 2
    reads.clear()
    # the last group of each table is cached; the group of `latents/` has latents 24 to 33
    index.latent(32)
    assert "latents" not in {key.split("/")[-2] for key, _ in reads}


@pytest.mark.system
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("whole_bytes", [0, 2**20])
def test_a_flipped_bit_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_bytes: int
) -> None:
    monkeypatch.setattr(dist_sae.index.latent_table, "WHOLE_BYTES", whole_bytes)
    run = produced(tmp_path)
    add_checkpoint(run)
    place = Path(make_index(run)["index"])
    right = Index(store_of(run), run.name)
    pages = [right.latent(n) for n in range(64)]
    path = next(place.glob("examples/00000000-*.parquet"))
    name = f"examples/{path.name}"
    data = path.read_bytes()
    # only pages, because the footer comes after them
    places = range(20, len(data) // 2, len(data) // 24)
    seen = 0
    for at in places:
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        index = Index(store_of(run), run.name)
        found: list[CorruptObjectError] = []
        for n in range(24):
            try:
                page = index.latent(n)
            except CorruptObjectError as error:
                found.append(error)
                continue
            assert page == pages[n]  # the flipped bit is in another row group, or has no effect
        seen += bool(found)
        assert all("\n" not in str(error) for error in found)
        assert {error.key for error in found} <= {f"world/index/{place.name}/{name}"}
    assert seen > len(places) / 2
    path.unlink()
    with pytest.raises(CorruptObjectError, match=r"is gone; run `dist-sae index --repair`"):
        Index(store_of(run), run.name).latent(0)


def test_what_is_not_there_gets_one_line(tmp_path: Path) -> None:
    run = produced(tmp_path, index={"postings": "none", "pairs": 0})
    runs = store_of(run)
    open_ = functools.partial(Index, runs, run.name)

    def fails(kind: type[DistSaeError], text: str, call: Callable[[], object]) -> None:
        with pytest.raises(kind, match=text) as caught:
            call()
        assert "\n" not in str(caught.value)

    fails(NoIndexError, "has no latent index yet; run `dist-sae index`", open_)
    add_checkpoint(run)
    make_index(run)
    fails(NoIndexError, r"has no index other; it has: step-00000003", lambda: open_("other"))
    fails(NoIndexError, "has no latent index of step 9 yet", lambda: open_(step=9))
    index = open_()
    fails(LatentNotFoundError, r"latent 64: .* has latents 0 to 63", lambda: index.latent(64))
    fails(LatentNotFoundError, "latent -1: ", lambda: index.examples(-1))
    fails(ConfigError, "has no postings", lambda: list(index.postings(0)))
    fails(ConfigError, "has no postings", lambda: list(index.bucket_postings(0)))
    assert index.latent(0).coactive == ()
    assert index.latent(0).examples
    runs.delete(IndexFolder(run.name, "step-00000003").buckets.key(0))
    fails(NoIndexError, "is not complete, 0 of 1 buckets are done; run", open_)
    manifest = read_record(IndexManifest, runs, IndexFolder(run.name, "step-00000003").manifest)
    newer = seal(manifest).replace(b'"schema_version":1', b'"schema_version":2')
    runs.put(IndexFolder(run.name, "step-00000003").manifest, newer)
    fails(
        CorruptObjectError, "has schema version 2, but this program reads 1; use the version", open_
    )


@pytest.mark.system
def test_the_index_of_the_last_step_is_taken_and_incomplete_ones_are_passed_over(
    tmp_path: Path,
) -> None:
    run = produced(tmp_path)
    add_checkpoint(run, step=3)
    make_index(run)
    add_checkpoint(run, step=12, seed=1)
    make_index(run)
    store = store_of(run)
    assert Index(store, run.name).manifest.step == 12
    assert Index(store, run.name, step=3).manifest.step == 3
    assert Index(store, run.name, "step-00000003").manifest.step == 3
    store.delete(IndexFolder(run.name, "step-00000012").buckets.key(0))
    assert Index(store, run.name).manifest.step == 3


def test_an_index_of_another_checkpoint_of_the_step_is_not_taken(tmp_path: Path) -> None:
    """An index of a deleted checkpoint is refused if the same step was trained again."""
    run = produced(tmp_path)
    add_checkpoint(run)
    make_index(run)
    checkpoints = Checkpoints(store_of(run), run.name, 9)
    assert index_of(store_of(run), run.name, checkpoints.open(3)).manifest.step == 3
    checkpoints.delete(3)
    add_checkpoint(run, seed=1)
    with pytest.raises(
        NoIndexError, match="step-00000003: belongs to another checkpoint; set a different"
    ):
        index_of(store_of(run), run.name, checkpoints.open(3))


def test_a_share_of_postings(tmp_path: Path) -> None:
    run = produced(tmp_path, index={"postings": 0.3})
    oracle = Oracle(run, add_checkpoint(run))
    make_index(run)
    index = Index(store_of(run), run.name)
    assert index.manifest.postings_share == 0.3
    dense = max(range(64), key=lambda n: len(oracle.firings(n)))
    found = pa.concat_tables(index.postings(dense))
    everything = {(*oracle.names[r][:2], act) for act, r in oracle.firings(dense)}
    rows = set(zip(*(found[c].to_pylist() for c in ("unit", "row", "act")), strict=True))
    assert rows < everything
    kept = {unit: index.has_postings(unit, np.arange(400)) for unit in oracle.units}
    assert rows == {(*name, act) for *name, act in everything if kept[name[0]][name[1]]}
    assert 0.15 < len(rows) / len(everything) < 0.45
    assert all(e.decile == TOP for e in index.latent(dense).largest)


@pytest.mark.system
@pytest.mark.usefixtures("small")
def test_pages_from_s3_are_those_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: Bucket
) -> None:
    monkeypatch.setattr(dist_sae.index.latent_table, "WHOLE_BYTES", 0)
    run = produced(tmp_path)
    add_checkpoint(run)
    make_index(run)
    folder = store_of(run)
    for key in folder.keys("world/index/"):
        bucket.client.put_object(Bucket=bucket.name, Key=key, Body=folder.get(key))
    store = open_store(f"s3://{bucket.name}", S3Config(endpoint_url=bucket.endpoint_url))
    here, there = Index(folder, run.name), Index(store, run.name)
    for n in (0, 23, 24, 63):
        assert there.latent(n) == here.latent(n)
        assert pa.concat_tables(there.postings(n)) == pa.concat_tables(here.postings(n))
