"""Activation sets that several test modules read."""

from pathlib import Path

import pytest

from dist_sae.data.shard import read_manifest
from dist_sae.storage import open_store
from tests.data.numbered import World
from tests.runs import make_run
from tests.world import RowNumbers, fill


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """An activation set with sixteen training units, which tests must not change."""
    run = make_run(tmp_path_factory.mktemp("numbered"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        made = fill(run, RowNumbers(), monkeypatch)
    store = open_store(run.store.activations)
    assert len(made.train_units) == 16
    rows = [sum(read_manifest(store, u).rows for u in made.stream_units(v)) for v in range(4)]
    return World(run, store, rows)


@pytest.fixture
def own_world(tmp_path: Path, world: World) -> World:
    """A copy of the activation set that tests can damage."""
    run = make_run(tmp_path)
    store = open_store(run.store.activations)
    for key in world.store.keys(""):
        store.put(key, world.store.get(key))
    return World(run, store, world.stream_rows)
