"""Checkpoints in the store: atomic, checksummed, and pruned."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dist_sae.checkpoint import layout
from dist_sae.checkpoint.layout import Checkpoints, Piece
from dist_sae.errors import CorruptObjectError
from dist_sae.storage import ObjectStore, open_store
from tests.world import Wrapped, save

TENSORS = {
    "W_enc": torch.randn(50, 3, generator=torch.Generator().manual_seed(0)),
    "idle_rows": torch.arange(50),
    "step": torch.tensor(7.0),
}


class Dying:
    """Store whose process dies at the n-th write."""

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
    # 16 rows of W_enc per part: several parts, the last one short
    monkeypatch.setattr(layout, "PART_BYTES", 200)
    checkpoints = Checkpoints(open_store(str(tmp_path)), "run", keep=2)
    save(checkpoints, 400, TENSORS, {"scale": 0.1})
    loaded = checkpoints.latest()
    assert loaded is not None
    assert (loaded.step, loaded.scalars) == (400, {"scale": 0.1})
    assert loaded.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(loaded.tensors[name], tensor)
        assert loaded.tensors[name].dtype == tensor.dtype
    assert loaded.has("W_enc")
    assert not loaded.has("W_dec")


class Counting(Wrapped):
    """Store that records what was fetched."""

    def __init__(self, store: ObjectStore) -> None:
        super().__init__(store)
        self.fetched: list[str] = []

    def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        self.fetched.append(key.rpartition("/")[2])
        return super().get(key, start, stop)


def test_any_rows_are_read_from_the_parts_that_hold_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "PART_BYTES", 12 * 20)  # 20 rows of W_enc, rounded down to 16
    store = Counting(open_store(str(tmp_path)))
    checkpoints = Checkpoints(store, "run", keep=2)
    save(checkpoints, 7, TENSORS, {})
    checkpoint, W_enc = checkpoints.open(7), TENSORS["W_enc"]
    for start in range(50):
        for stop in range(start + 1, 51):
            assert torch.equal(checkpoint.read("W_enc", start, stop), W_enc[start:stop])
    for rows, parts in (
        ((16, 32), ["016"]),
        ((15, 16), ["000"]),
        ((15, 33), ["000", "016", "032"]),
    ):
        store.fetched.clear()
        checkpoint.read("W_enc", *rows)
        assert store.fetched == [f"W_enc-000000{part}.safetensors" for part in parts]


def test_what_ranks_write_apart_is_one_tensor(tmp_path: Path) -> None:
    """Parts written by several ranks form one tensor, whatever the order of the ranks' records.

    One rank stores the replicated tensors.
    """
    checkpoints = Checkpoints(open_store(str(tmp_path)), "run", keep=2)
    W_enc, bias = TENSORS["W_enc"], torch.arange(3.0)
    records = []
    for first, stop in ((30, 50), (0, 10), (10, 30)):
        own = bias if first == 0 else bias[:0]
        pieces = [Piece("W_enc", W_enc[first:stop], first, 50), Piece("b_dec", own, 0, 3)]
        records.append(checkpoints.write(4, pieces))
    assert checkpoints.latest() is None  # no checkpoint exists before the commit
    size = checkpoints.commit(4, records, {})
    checkpoint = checkpoints.open(4)
    assert torch.equal(checkpoint.read("W_enc"), W_enc)
    assert torch.equal(checkpoint.read("W_enc", 5, 45), W_enc[5:45])
    assert torch.equal(checkpoint.read("b_dec"), bias)
    folder = tmp_path / "run/checkpoints/step-00000004"
    assert size == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert len(list(folder.glob("b_dec-*"))) == 1


@pytest.mark.parametrize("writes", range(5))
def test_a_death_at_any_write_leaves_the_one_before(tmp_path: Path, writes: int) -> None:
    store = open_store(str(tmp_path))
    save(Checkpoints(store, "run", keep=2), 1, TENSORS, {})
    newer: dict[str, Tensor] = {name: tensor + 1 for name, tensor in TENSORS.items()}
    dying = Checkpoints(Dying(store, writes), "run", keep=2)  # type: ignore[arg-type]
    if writes < 4:  # three tensors and the manifest
        with pytest.raises(KeyboardInterrupt):
            save(dying, 2, newer, {})
    else:
        save(dying, 2, newer, {})
    checkpoint = Checkpoints(store, "run", keep=2).latest()
    assert checkpoint is not None
    assert checkpoint.step == (1 if writes < 4 else 2)
    save(Checkpoints(store, "run", keep=2), 2, newer, {})  # the save can be repeated
    assert Checkpoints(store, "run", keep=2).steps() == [1, 2]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    checkpoints = Checkpoints(store, "run", keep=2)
    for step in (10, 20, 30):
        save(checkpoints, step, TENSORS, {})
    assert checkpoints.steps() == [20, 30]
    assert not list(store.keys("run/checkpoints/step-00000010"))
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == [
        "step-00000020",
        "step-00000030",
    ]


def test_every_mth_and_the_best_are_kept_as_well(tmp_path: Path) -> None:
    """Every 20th step and the two best are kept as well.

    Held-out FVU falls until step 25 and then rises. Checkpoints without an FVU are not candidates
    for the best.
    """
    checkpoints = Checkpoints(open_store(str(tmp_path)), "run", keep=2, every=20, best=2)
    fvu = {5: None, 10: 0.5, 15: 0.4, 20: 0.3, 25: 0.2, 30: 0.3, 35: 0.4, 40: 0.5, 45: 0.6}
    for step, value in fvu.items():
        save(checkpoints, step, TENSORS, {"heldout_fvu": value})
    assert checkpoints.steps() == [20, 25, 40, 45]


@pytest.mark.parametrize("damage", ["flip", "cut", "manifest"])
def test_damage_is_found_and_named(tmp_path: Path, damage: str) -> None:
    store = open_store(str(tmp_path))
    save(Checkpoints(store, "run", keep=1), 3, TENSORS, {})
    name = "manifest.json" if damage == "manifest" else "W_enc-000000000.safetensors"
    key = f"run/checkpoints/step-00000003/{name}"
    data = bytearray(store.get(key))
    if damage == "flip":
        data[-1] ^= 1
    store.put(key, bytes(data[:-5] if damage != "flip" else data))
    with pytest.raises(CorruptObjectError, match=name) as caught:
        Checkpoints(store, "run", keep=1).open(3).read("W_enc")
    assert caught.value.key == key
