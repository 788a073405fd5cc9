"""Activations that must never be stored, such as NaN."""

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dist_sae.config import Run
from dist_sae.errors import NonFiniteError
from dist_sae.producing.planner import plan
from dist_sae.storage import ObjectStore
from tests.producing.producers import UNITS, start, with_source
from tests.runs import DOCUMENT_ROWS, make_run
from tests.world import RowNumbers, fill


def test_nan_is_reported_with_its_place_and_stops_a_producer_that_waits_for_others(
    run: Run, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN or infinity ends a producer, even while its preparing thread waits for other producers.

    The error names document and position. A live producer has claimed all other units.
    """
    documents = [span.first for span in plan(run).units[0]]
    number = documents[3] * DOCUMENT_ROWS + 5

    class Broken(RowNumbers):
        def run(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
            acts = super().run(tokens, mask)["synthetic"]
            acts[tokens == number, 1] = torch.inf
            return {"synthetic": acts}

    for unit in range(1, UNITS):
        store.put(f"claims/{unit:08d}.json", b'{"worker": "other", "until": 1e12}')
    with_source(monkeypatch, Broken())
    stopping = threading.Event()
    rescue = threading.Timer(20, stopping.set)  # so that a bug fails the test instead of hanging it
    rescue.start()
    with pytest.raises(NonFiniteError) as caught:
        start(run, "a", stopping)
    assert rescue.is_alive()
    rescue.cancel()
    assert f"synthetic: NaN or infinity in document {documents[3]} at position 5;" in str(
        caught.value
    )
    assert list(store.keys("units/")) == []
    assert list(store.keys("shards/")) == []
    assert not store.size("claims/00000000.json")


def test_what_overflows_the_storage_type_is_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values that overflow the storage type are refused.

    Row numbers above 65,504 do not fit into fp16.
    """
    corpus = {"documents": 5000}
    run = make_run(tmp_path, corpus=corpus, activations={"dtype": "fp16", "unit_rows": 20_000})
    with pytest.raises(NonFiniteError, match=r"wider .*activations\.dtype"):
        fill(run, RowNumbers(), monkeypatch)
