"""One-line errors of `dist-sae index`, and units that were deleted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dist_sae.data.consumers
from dist_sae.config import Run
from dist_sae.data.consumers import Retired
from dist_sae.data.plan import load_plan
from dist_sae.data.shard import SHARDS
from dist_sae.errors import (
    ConfigError,
    CorruptObjectError,
    DistSaeError,
    PlanMismatchError,
    StoreFullError,
)
from dist_sae.index.query import Index
from dist_sae.storage import open_store
from dist_sae.storage.local import LocalStore
from dist_sae.storage.records import seal
from tests.index.indexed import Oracle, add_checkpoint, make_index, produced
from tests.world import changed


def with_index(run: Run, **settings: Any) -> Run:
    return run.model_copy(update={"index": run.index.model_copy(update=settings)})


def fails(kind: type[DistSaeError], text: str, call: Callable[[], object]) -> None:
    with pytest.raises(kind, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_without_a_checkpoint_there_is_nothing_to_index(tmp_path: Path) -> None:
    run = produced(tmp_path)
    fails(ConfigError, "has no checkpoint yet; run `dist-sae train`", lambda: make_index(run))


@pytest.mark.system
def test_an_index_keeps_its_checkpoint_and_its_settings(tmp_path: Path) -> None:
    run = with_index(produced(tmp_path), name="mine")
    add_checkpoint(run, step=3)
    first = make_index(run)
    add_checkpoint(run, step=5, seed=1)
    fails(
        ConfigError,
        r"mine/: belongs to step 3, not 5; .*index.name, or use --step 3",
        lambda: make_index(run),
    )
    assert make_index(run, step=3) == first
    fails(
        ConfigError,
        r"was created with index.examples = 6, not 7; change it back, or .*index.name",
        lambda: make_index(with_index(run, examples=7), step=3),
    )
    other = make_index(with_index(run, name=None))
    assert other["index"].endswith("/index/step-00000005")
    assert other["fvu"] != first["fvu"]


def test_a_run_on_another_set_is_refused(tmp_path: Path) -> None:
    run = produced(tmp_path)
    add_checkpoint(run)
    path = next(Path(run.store.runs).rglob("manifest.json"))
    scalars = json.loads(path.read_bytes())["scalars"] | {"plan": "other"}
    path.write_bytes(changed(path.read_bytes(), scalars=scalars))
    fails(
        PlanMismatchError,
        "was trained on a different activation set than .*restore store.activations",
        lambda: make_index(run),
    )


def test_an_index_of_a_later_version_is_left_to_it(tmp_path: Path) -> None:
    run = produced(tmp_path)
    add_checkpoint(run)
    path = Path(make_index(run)["index"], "index.json")
    path.write_bytes(changed(path.read_bytes(), schema_version=2))
    fails(
        CorruptObjectError,
        "has schema version 2, but this program reads 1",
        lambda: make_index(run),
    )


def test_an_index_that_is_older_than_a_setting_has_its_default(tmp_path: Path) -> None:
    run = produced(tmp_path)
    add_checkpoint(run)
    first = make_index(run)
    path = Path(first["index"], "index.json")
    settings = json.loads(path.read_bytes())["settings"]
    del settings["neighbours"]
    path.write_bytes(changed(path.read_bytes(), settings=settings))
    assert make_index(run) == first
    text = "was created with index.neighbours = 16, not 3"
    fails(ConfigError, text, lambda: make_index(with_index(run, neighbours=3)))


def test_a_damaged_manifest_says_what_to_do(tmp_path: Path) -> None:
    run = produced(tmp_path)
    add_checkpoint(run)
    place = make_index(run)["index"]
    path = Path(place, "index.json")
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole.replace(b"world", b"wurld")):
        path.write_bytes(damaged)
        text = rf"index.json: .*; delete {place}/ and index again, or use another index.name$"
        fails(CorruptObjectError, text, lambda: make_index(run))
        fails(CorruptObjectError, text, lambda: Index(open_store(run.store.runs), run.name))


def test_deleted_units_are_named_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Units deleted before or during indexing are named in the log and left out."""
    run = produced(tmp_path)
    sae = add_checkpoint(run)
    store = open_store(run.store.activations)
    retire(run, below=2)
    retired_later = iter([2, 2, 2])  # at the start, and for the first units

    def retired_below(_: object) -> int:
        return next(retired_later, 3)

    monkeypatch.setattr(dist_sae.data.consumers, "retired_below", retired_below)
    monkeypatch.setattr("dist_sae.index.build.retired_below", lambda _: 3)
    result = make_index(run)
    assert result["deleted_units"] == 3
    assert "units 0 to 1 were deleted (store.retention)" in caplog.text
    assert "unit 2 was deleted (store.retention); it is left out" in caplog.text
    monkeypatch.undo()
    retire(run, below=3)
    oracle = Oracle(run, sae)
    assert (result["rows"], result["fvu"]) == (len(oracle.codes), pytest.approx(oracle.fvu))
    assert not [key for key in SHARDS.keys(store) if int(key["unit"]) < 3]


def test_a_set_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    run = produced(tmp_path, activations={"heldout_share": 0.0})
    add_checkpoint(run)
    made = load_plan(open_store(run.store.activations), run)
    retire(run, below=len(made.units))
    fails(
        ConfigError,
        r"all \d+ units were deleted \(store.retention\) and none is held out",
        lambda: make_index(run),
    )
    assert not list(Path(run.store.runs).rglob("index.json"))


def retire(run: Run, below: int) -> None:
    store = open_store(run.store.activations)
    for key in list(SHARDS.keys(store)):
        if int(key["unit"]) < below:
            store.delete(key[0])
    store.put("retired.json", seal(Retired(below=below)))


def test_a_part_of_the_set_begins_with_what_is_held_out(tmp_path: Path) -> None:
    run = with_index(produced(tmp_path), rows=400)
    add_checkpoint(run)
    result = make_index(run)
    made = load_plan(open_store(run.store.activations), run)
    units = json.loads(Path(result["index"], "index.json").read_bytes())["units"]
    assert units == [0, *made.heldout_units]
    assert result["units"] == len(units)


def test_a_full_disk_ends_a_worker_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = produced(tmp_path)
    add_checkpoint(run)
    put, full = LocalStore.put, [True]

    def refuse(self: LocalStore, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        if full[0] and "/codes/00000004" in key:
            raise StoreFullError("no space left", url=self.url, key=key)
        return put(self, key, data, if_absent=if_absent)

    monkeypatch.setattr(LocalStore, "put", refuse)
    fails(StoreFullError, "no space left", lambda: make_index(run))
    claims = Path(run.store.runs).rglob("claims/*/*.json")
    assert not list(claims)
    full[0] = False
    units = sorted(Path(run.store.runs).rglob("units/*.json"))
    before = {path: path.stat().st_mtime_ns for path in units}
    assert before
    make_index(run)
    assert {path: path.stat().st_mtime_ns for path in units} == before
