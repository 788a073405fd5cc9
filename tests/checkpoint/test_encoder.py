"""An encoder read from storage on demand gives the same codes as the dictionary in memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_sae.checkpoint import layout
from dist_sae.checkpoint.encoder import StoredEncoder
from dist_sae.checkpoint.layout import Checkpoint, Checkpoints
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.interface import Codes
from dist_sae.dictionaries.recipes.routed import Routed
from dist_sae.errors import CorruptObjectError
from dist_sae.kernels import select
from dist_sae.storage import UNMETERED, ObjectStore
from dist_sae.storage.local import LocalStore
from dist_sae.storage.metered import MeteredStore
from tests.checkpoint.test_pages import RECIPES, dense, saved
from tests.dictionaries.recipes import CONFIGS, D_IN, LAYERS, make, relative_error, rows, widths

ROW_BYTES = 4 * D_IN
PART_ROWS = 8


class Folder(LocalStore):
    """Store that records which objects are read."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.read: list[str] = []

    def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        self.read.append(Path(key).name)
        return super().get(key, start, stop)

    @contextmanager
    def file(self, key: str) -> Iterator[Path]:
        self.read.append(Path(key).name)
        with super().file(key) as path:
            yield path

    def of_encoder(self) -> list[int]:
        """Return the first rows of the encoder parts read since the last call."""
        names = [name for name in self.read if name.startswith("W_enc-")]
        self.read = []
        return [int(name.removeprefix("W_enc-").partition(".")[0]) for name in names]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """A store with parts of eight latents. Products use five latents at a time."""
    monkeypatch.setattr(layout, "PART_BYTES", PART_ROWS * ROW_BYTES)
    monkeypatch.setattr(select, "CHUNK_LATENTS", 5)
    return Folder(str(tmp_path))


def stored(sae: Dictionary, store: ObjectStore) -> Checkpoint:
    """Save a dictionary, and open it through a store on the same folder."""
    saved(Path(store.url), sae)
    return Checkpoints(store, "run", 1).open(1)


def encoder(checkpoint: Checkpoint, sae: Dictionary, memory_bytes: int = 0) -> StoredEncoder:
    return StoredEncoder(sae.config, widths(sae.config), checkpoint, memory_bytes)  # type: ignore[arg-type]


def assert_same(found: Codes, expected: Codes) -> None:
    """Check that the same latents are active; activations may round as in `select.products`."""
    assert expected.acts.any()
    one, other = dense(found), dense(expected)
    assert torch.equal(one > 0, other > 0)
    assert relative_error(one, other) <= 1e-6


@pytest.mark.parametrize("kind", RECIPES)
def test_codes_are_those_of_the_dictionary(kind: str, folder: Folder) -> None:
    """Codes match the dictionary's, from a memory-mapped folder and from another store."""
    sae, x = make(RECIPES[kind], torch.float32), rows(torch.float32)
    for store in (folder, MeteredStore(folder, UNMETERED)):
        assert_same(encoder(stored(sae, store), sae).encode(x), sae.encode(x))
    assert "W_dec" not in " ".join(folder.read)


def test_only_the_experts_of_the_rows_are_read(folder: Folder) -> None:
    """Only the parts of the rows' own experts are read, each once.

    An expert has 16 latents in two parts.
    """
    sae = make(CONFIGS["routed"], torch.float32)
    x = rows(torch.float32)[:1]
    assert isinstance(sae, Routed)
    experts = sae.route(x - sae.b_dec).experts.flatten().tolist()
    checkpoint = stored(sae, folder)
    mapped = encoder(checkpoint, sae)
    folder.read = []
    assert_same(mapped.encode(x), sae.encode(x))
    assert {*folder.of_encoder()} == {16 * e + part for e in experts for part in (0, 8)}
    assert not {name for name in folder.read if name.startswith("W_dec")}
    mapped.encode(x)
    assert not folder.of_encoder()


def test_parts_from_elsewhere_are_kept_while_they_fit(folder: Folder) -> None:
    """Parts from a remote store stay in memory as long as they fit: three of eight here."""
    sae, x = make(CONFIGS["topk"], torch.float32), rows(torch.float32)
    checkpoint = stored(sae, MeteredStore(folder, UNMETERED))
    some = encoder(checkpoint, sae, 3 * PART_ROWS * ROW_BYTES + 1)
    for expected in (range(0, 64, 8), range(24, 64, 8)):
        assert_same(some.encode(x), sae.encode(x))
        assert [*dict.fromkeys(folder.of_encoder())] == [*expected]


def test_of_layers_that_take_turns_only_one_is_copied(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a CLT, only one layer's latents are copied from the interleaved rows.

    Five latents of one layer are spread over 20 rows, some of them across two parts.
    """
    sae, x = make(CONFIGS["clt"], torch.float32), rows(torch.float32)
    stored_encoder = encoder(stored(sae, folder), sae)
    copied, cat = list[torch.Size](), torch.cat

    def noted(*arguments: Any, **more: Any) -> Tensor:
        copied.append((joined := cat(*arguments, **more)).shape)
        return joined

    monkeypatch.setattr(torch, "cat", noted)
    found = stored_encoder.encode(x)
    assert {shape[0] for shape in copied if shape[1:] == (D_IN // len(LAYERS),)} == {5}
    assert_same(found, sae.encode(x))


def test_a_mapped_part_outlives_its_file_and_a_damaged_one_is_found(folder: Folder) -> None:
    sae, x = make(CONFIGS["topk"], torch.float32), rows(torch.float32)
    mapped = encoder(stored(sae, folder), sae)
    mapped.encode(x)
    (part,) = folder.root.rglob("W_enc-000000008.safetensors")
    data = bytearray(part.read_bytes())
    part.unlink()
    assert_same(mapped.encode(x), sae.encode(x))
    data[-1] ^= 1
    part.write_bytes(data)
    with pytest.raises(CorruptObjectError, match="does not match its checksum"):
        encoder(Checkpoints(folder, "run", 1).open(1), sae).encode(x)
