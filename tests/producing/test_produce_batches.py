"""The size of the model's batches does not change a unit, and adapts to the memory."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dist_sae.config import Run
from dist_sae.errors import ModelError
from dist_sae.models.forward import Forward, without_retries
from dist_sae.storage import ObjectStore, open_store
from tests.producing.producers import (
    SITES,
    TEXTS,
    LetterSource,
    letters_run,
    rows_of,
    start,
    stored_units,
    with_source,
)
from tests.world import same


def check_same_units(store: ObjectStore, other: Run) -> None:
    there = open_store(other.store.activations)
    for unit in stored_units(store):
        assert same(rows_of(store, unit, SITES[1]), rows_of(there, unit, SITES[1]))


def test_units_do_not_depend_on_how_the_model_is_batched(
    letters: tuple[Run, ObjectStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, store = letters
    start(run, "a")
    (tmp_path / "b").mkdir()
    other = letters_run(tmp_path / "b", monkeypatch, TEXTS, batch_tokens=400)
    start(other, "a")
    check_same_units(store, other)


class SmallMemory(LetterSource):
    """A model with memory for a limited number of tokens.

    The first out-of-memory error is CUDA's. Later ones are those of CPU memory.
    """

    def __init__(self, room: int, error: Exception | None = None) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self._room, self._error = room, error

    def run(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        self.sizes.append(tokens.numel())
        if tokens.numel() > self._room:
            error: Exception = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            if len(self.sizes) > 1:
                error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")
            raise self._error or error
        return super().run(tokens, mask)


def test_a_model_that_runs_out_of_memory_gets_smaller_batches_from_then_on(
    letters: tuple[Run, ObjectStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, store = letters
    start(run, "a")
    (tmp_path / "b").mkdir()
    other = letters_run(tmp_path / "b", monkeypatch, TEXTS, batch_tokens=40)
    source = SmallMemory(room=10)
    with_source(monkeypatch, source)
    start(other, "a")
    check_same_units(store, other)
    assert source.sizes[:3] == [40, 20, 10]
    assert max(source.sizes[3:]) <= 10


@pytest.mark.parametrize(
    ("room", "error", "expected", "words"),
    [
        (4, None, ModelError, "a single context of 5 tokens does not fit into memory"),
        (10, RuntimeError("another"), RuntimeError, "^another$"),
    ],
)
def test_what_no_smaller_batch_mends_is_an_error(
    letters: tuple[Run, ObjectStore],
    monkeypatch: pytest.MonkeyPatch,
    room: int,
    error: Exception | None,
    expected: type[Exception],
    words: str,
) -> None:
    run, store = letters
    with_source(monkeypatch, SmallMemory(room, error))
    with pytest.raises(expected, match=words):
        start(run, "a")
    assert stored_units(store) == []


@pytest.mark.parametrize("rank", ["leads", "follows"])
def test_ranks_that_share_a_model_do_not_try_again(rank: str) -> None:
    source = SmallMemory(room=10)
    run = without_retries(source.run)
    tokens = torch.ones(8, 5, dtype=torch.int32)
    everything = torch.ones(8, 5, dtype=torch.bool)
    forward = Forward(SimpleNamespace(run=run), None)
    work = partial(forward, tokens, everything) if rank == "leads" else partial(run, tokens)
    with pytest.raises(
        ModelError, match=r"lower model\.batch_tokens or raise model\.tensor_parallel"
    ):
        work(everything)
    assert len(source.sizes) == 1
