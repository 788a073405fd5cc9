"""Foreign objects next to ours are ignored in every listing, with one warning per folder."""

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.commands.cli import main
from dist_sae.config import Run, load_run
from dist_sae.data import upkeep
from dist_sae.data.backlog import ReadyUnits
from dist_sae.data.consumers import Consumers
from dist_sae.data.plan import load_plan
from dist_sae.data.work_queue import Worker
from dist_sae.kubernetes.stored import StoredRun
from dist_sae.producing.unit_queue import unit_queue
from dist_sae.producing.verify import verify
from dist_sae.storage import ObjectStore, keys, open_store
from dist_sae.telemetry.history import History, read_history
from tests.conftest import Bucket
from tests.runs import TINY, write_run
from tests.world import save

ALIEN = (
    ".DS_Store",
    ".nfs00000000012c03b100000001",
    "._00000000.json",
    "Thumbs.db",
    "lost+found/x",
)
COPIES = ("{}~", "{}.bak", ".{}.swp", "copy of {}", "{} (1)")


def litter(store: ObjectStore, put: Callable[[str, bytes], object]) -> int:
    """Put foreign objects into every folder, as file managers do; return the number of folders."""
    own_keys = list(store.keys())
    folders = {"claims/", *(f"{key.rpartition('/')[0]}/" for key in own_keys if "/" in key)}
    for folder in folders:
        for name in ALIEN:
            put(f"{folder}{name}", b"alien")
    for key in own_keys:
        folder, _, name = key.rpartition("/")
        for shape in COPIES:
            put(f"{folder}/{shape.format(name)}", store.get(key))
        if name == "manifest.json":
            put(f"{folder.rpartition('/')[0]}/keep-me/{name}", store.get(key))
            put(f"{folder} copy/{name}", store.get(key))
    return len(folders)


def numbers(run: Run) -> dict[str, Any]:
    """Collect everything that programs find by listing."""
    activations, runs = (
        open_store(url, run.store.s3) for url in (run.store.activations, run.store.runs)
    )
    plan = load_plan(activations, run)
    consumers = Consumers(activations, 1.0)
    claims = unit_queue(activations, plan, Worker("b"), threading.Event(), consumers)
    checkpoints = Checkpoints(runs, run.name, 2)
    return {
        "ls": {k: v for k, v in upkeep.ls(run).items() if k not in ("runs", "claims")},
        "runs": [consumer for consumer, _ in consumers.all()],
        "claims": list(upkeep.ls(run)["claims"]),
        "free": (claims.take(wait=False), claims.left()),
        "verify": verify(run),
        "orphans": upkeep.gc(run, hours=-1.0, delete=False),
        "ready": ReadyUnits(activations, plan, print).count(),
        "status": StoredRun(run).progress() | {"checkpoint_age_seconds": 0},
        "complete": StoredRun(run).is_complete(),
        "steps": (checkpoints.steps(), checkpoints.folders()),
        "history": read_history(runs, run.name),
    }


@pytest.fixture(params=["folder", "s3"])
def world(
    request: pytest.FixtureRequest, tmp_path: Path
) -> tuple[Run, Callable[[str, str, bytes], None]]:
    """A run with every kind of object, and a way to write without the code under test."""
    places: dict[str, Any] = {}
    if request.param == "s3":
        bucket: Bucket = request.getfixturevalue("bucket")
        endpoint = {"endpoint_url": bucket.endpoint_url}
        places = {f: f"s3://{bucket.name}/{f}" for f in ("activations", "runs")} | {"s3": endpoint}
    path = write_run(tmp_path, TINY, store=places)
    run = load_run(path)
    for command in ("plan", "produce"):
        assert main([command, str(path)]) == 0
    activations, runs = (
        open_store(url, run.store.s3) for url in (run.store.activations, run.store.runs)
    )
    activations.delete("units/00000001.json")  # so its shard is an orphan
    activations.put("claims/00000001.json", json.dumps({"worker": "a"}).encode())
    Consumers(activations, 1.0).report("tiny", reached=2, needed=1)
    for step in (4, 8):
        save(Checkpoints(runs, "tiny", 2), step, {"W_enc": torch.zeros(4, 2)}, {})
        history = History(runs, "tiny", step)
        history.append({"step": step, "fvu": 0.5})
        history.flush()

    def put(folder: str, key: str, data: bytes) -> None:
        if request.param == "s3":
            bucket.client.put_object(Bucket=bucket.name, Key=f"{folder}/{key}", Body=data)
            return
        file = tmp_path / folder / key
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)

    return run, put


@pytest.mark.system
def test_what_is_not_ours_is_passed_by_and_named_once(
    world: tuple[Run, Callable[[str, str, bytes], None]], caplog: pytest.LogCaptureFixture
) -> None:
    run, put = world
    before = numbers(run)
    assert before["free"] == (None, {1})  # the other unit is claimed by another worker
    assert before["steps"] == ([4, 8], {4, 8})
    assert before["orphans"]["orphans"] == 1
    for folder in ("activations", "runs"):
        store = open_store(getattr(run.store, folder), run.store.s3)
        litter(store, lambda key, data, folder=folder: put(folder, key, data))  # type: ignore[misc]
        if run.store.activations.startswith("s3://"):
            for empty in ("claims/", "units/", "tiny/checkpoints/step-00000008/"):
                put(folder, empty, b"")
    caplog.clear()
    keys.warned.clear()
    with caplog.at_level(logging.WARNING):
        assert numbers(run) == before
        assert numbers(run) == before
    named = [record.getMessage() for record in caplog.records]
    assert all("not a dist-sae object" in message for message in named)
    # units, shards, claims, consumers, checkpoints, history
    assert len(named) == 6


@pytest.mark.system
def test_what_is_not_ours_is_not_deleted(
    world: tuple[Run, Callable[[str, str, bytes], None]],
) -> None:
    run, put = world
    stores = {f: open_store(getattr(run.store, f), run.store.s3) for f in ("activations", "runs")}
    others = {}
    for folder, store in stores.items():
        ours = set(store.keys())
        litter(store, lambda key, data, folder=folder: put(folder, key, data))  # type: ignore[misc]
        others[folder] = set(store.keys()) - ours
    assert upkeep.gc(run, hours=-1.0, delete=True)["orphans"] == 1
    save(Checkpoints(stores["runs"], "tiny", 1), 12, {"W_enc": torch.zeros(4, 2)}, {})
    History(stores["runs"], "tiny", 0).flush()  # deletes the records from steps 4 and 8 on
    assert set(stores["activations"].keys()) >= others["activations"]
    assert set(stores["runs"].keys()) - others["runs"] == {
        "tiny/checkpoints/step-00000012/W_enc-000000000.safetensors",
        "tiny/checkpoints/step-00000012/manifest.json",
    }
    assert set(stores["runs"].keys()) >= others["runs"]


@pytest.mark.system
def test_a_copy_of_a_checkpoint_under_another_step_is_not_taken_for_it(
    world: tuple[Run, Callable[[str, str, bytes], None]],
) -> None:
    run, put = world
    runs = open_store(run.store.runs, run.store.s3)
    manifest = runs.get("tiny/checkpoints/step-00000008/manifest.json")
    put("runs", "tiny/checkpoints/step-00000099/manifest.json", manifest)
    latest = Checkpoints(runs, "tiny", 2).latest()
    assert latest is not None
    assert latest.step == 8
