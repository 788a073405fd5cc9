"""The progress of an index, read without building it."""

import threading
from pathlib import Path

import pytest

from dist_sae.commands.cli import main
from dist_sae.config import dump_run
from dist_sae.errors import Stopped
from dist_sae.index.layout import IndexFolder, index_name
from dist_sae.index.progress import await_index, index_progress, is_indexed
from dist_sae.storage import open_store
from tests.index.indexed import add_checkpoint, make_index, produced


def test_an_index_is_complete_with_all_buckets_for_the_settings_and_the_checkpoint(
    tmp_path: Path,
) -> None:
    run = produced(tmp_path)
    assert not is_indexed(run)  # no checkpoint yet
    add_checkpoint(run, step=3)
    assert not is_indexed(run)
    made = make_index(run)
    assert is_indexed(run, threading.Event())
    workers = run.model_copy(update={"index": run.index.model_copy(update={"workers": 9})})
    assert is_indexed(workers)
    fewer = run.model_copy(update={"index": run.index.model_copy(update={"examples": 5})})
    assert not is_indexed(fewer)
    named = run.model_copy(update={"index": run.index.model_copy(update={"name": "mine"})})
    assert not is_indexed(named)

    store, folder = open_store(run.store.runs), IndexFolder(run.name, index_name(run, 3))
    there = index_progress(store, run, 3)
    assert there is not None
    assert (there.units, there.buckets, there.codes_deleted) == (made["units"], 1, True)
    store.put(f"{folder.codes}x.bin", b"")  # as if a worker had died before it deleted all codes
    assert not is_indexed(run)
    store.delete(f"{folder.codes}x.bin")
    assert is_indexed(run)
    store.delete(folder.buckets.key(0))
    assert not is_indexed(run)


def test_the_index_of_another_checkpoint_does_not_count(tmp_path: Path) -> None:
    run = produced(tmp_path, index={"name": "mine"})
    add_checkpoint(run, step=3)
    make_index(run)
    assert is_indexed(run)
    add_checkpoint(run, step=4)
    assert not is_indexed(run)
    assert index_progress(open_store(run.store.runs), run, 4) is not None


def test_who_waits_for_an_index_goes_on_once_it_is_complete(tmp_path: Path) -> None:
    run = produced(tmp_path)
    add_checkpoint(run)
    stopping = threading.Event()
    stopping.set()
    with pytest.raises(Stopped, match="waiting for the index of"):
        await_index(run, stopping)
    make_index(run)
    await_index(run, stopping)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_evaluation_that_waits_waits_for_the_index_that_a_run_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    run = produced(tmp_path, index={"workers": workers})
    add_checkpoint(run, step=run.steps)
    path = tmp_path / "run.yaml"
    path.write_text(dump_run(run))
    waited = list[str]()

    def wait(what: str, *_: object) -> None:
        waited.append(what)
        raise Stopped("")

    monkeypatch.setattr("dist_sae.index.progress.await_until", wait)
    assert main(["evaluate", str(path), "--wait"]) == (75 if workers else 0)
    assert waited == [f"the index of {tmp_path}/runs/world"] * workers
