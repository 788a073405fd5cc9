"""Checkpoints: there whole or not at all, checked, and only as many as wanted."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dist_sae.checkpoint import layout
from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.errors import CorruptObjectError
from dist_sae.storage import ObjectStore, open_store

TENSORS = {
    "W_enc": torch.randn(50, 3, generator=torch.Generator().manual_seed(0)),
    "idle_rows": torch.arange(50),
    "step": torch.tensor(7.0),
}


class Dying:
    """A store whose process dies at the n-th write."""

    def __init__(self, store: ObjectStore, writes: int) -> None:
        self._store = store
        self._left = writes

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        if not self._left:
            raise KeyboardInterrupt
        self._left -= 1
        return self._store.put(key, data, if_absent=if_absent)

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)


def test_what_is_saved_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_PART_BYTES", 200)  # 16 rows of W_enc: several parts, a short last
    checkpoints = Checkpoints(open_store(str(tmp_path)), "run", keep=2)
    checkpoints.save(400, TENSORS, {"scale": 0.1})
    loaded = checkpoints.latest()
    assert loaded is not None
    assert (loaded.step, loaded.scalars) == (400, {"scale": 0.1})
    assert loaded.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(loaded.tensors[name], tensor)
        assert loaded.tensors[name].dtype == tensor.dtype
    some = checkpoints.load(400, ["W_enc"])
    assert list(some.tensors) == ["W_enc"]


@pytest.mark.parametrize("writes", range(5))
def test_a_death_at_any_write_leaves_the_one_before(tmp_path: Path, writes: int) -> None:
    store = open_store(str(tmp_path))
    Checkpoints(store, "run", keep=2).save(1, TENSORS, {})
    newer: dict[str, Tensor] = {name: tensor + 1 for name, tensor in TENSORS.items()}
    dying = Checkpoints(Dying(store, writes), "run", keep=2)  # type: ignore[arg-type]
    if writes < 4:  # three tensors and the manifest
        with pytest.raises(KeyboardInterrupt):
            dying.save(2, newer, {})
    else:
        dying.save(2, newer, {})
    checkpoint = Checkpoints(store, "run", keep=2).latest()
    assert checkpoint is not None
    assert checkpoint.step == (1 if writes < 4 else 2)
    Checkpoints(store, "run", keep=2).save(2, newer, {})  # and the save can be done again
    assert Checkpoints(store, "run", keep=2).steps() == [1, 2]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    checkpoints = Checkpoints(store, "run", keep=2)
    for step in (10, 20, 30):
        checkpoints.save(step, TENSORS, {})
    assert checkpoints.steps() == [20, 30]
    assert not list(store.keys("run/checkpoints/step-00000010"))
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == [
        "step-00000020",
        "step-00000030",
    ]


@pytest.mark.parametrize("damage", ["flip", "cut", "manifest"])
def test_damage_is_found_and_named(tmp_path: Path, damage: str) -> None:
    store = open_store(str(tmp_path))
    Checkpoints(store, "run", keep=1).save(3, TENSORS, {})
    name = "manifest.json" if damage == "manifest" else "W_enc-000000000.safetensors"
    key = f"run/checkpoints/step-00000003/{name}"
    data = bytearray(store.get(key))
    if damage == "flip":
        data[-1] ^= 1
    store.put(key, bytes(data[:-5] if damage != "flip" else data))
    with pytest.raises(CorruptObjectError, match=name) as caught:
        Checkpoints(store, "run", keep=1).latest()
    assert caught.value.key == key
