from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dist_sae.data.activation_set
from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.shard import manifest_key
from dist_sae.errors import ObjectNotFoundError, UnitMissingError
from dist_sae.storage import Entry
from tests.runs import make_run
from tests.world import RowNumbers, Wrapped, fill, joined, open_activation_set


class Counting(Wrapped):
    gets = 0

    def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        self.gets += 1
        return super().get(key, start, stop)


def test_rows_end_with_the_limit_and_nothing_is_read_beyond_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading stops at the row limit, and no block beyond the limit is fetched.

    Reads units 1 and 3 in this order. The limit is the first unit's rows plus one, or exactly its
    rows.
    """
    run = make_run(tmp_path)
    fill(run, RowNumbers(), monkeypatch)
    store = Counting(open_activation_set(run).store)
    activations = open_activation_set(run, store=store)
    n, blocks = (
        activations.manifest(1).rows,
        [block.rows for block in activations.manifest(1).sites[run.site].blocks],
    )
    both = joined(activations.rows([1, 3], 10**6))
    assert both.dtype == torch.float32
    assert torch.equal(joined(activations.rows([1, 3], n + 1)), both[: n + 1])
    store.gets = 0
    assert torch.equal(joined(activations.rows([1, 3], n)), both[:n])
    assert store.gets == 1 + len(blocks)
    heldout = joined(activations.heldout_rows(10**6))
    assert len(heldout) == sum(activations.manifest(u).rows for u in activations.plan.heldout_units)


def test_a_reader_that_does_not_wait_names_the_missing_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    plan = fill(run, RowNumbers(), monkeypatch)
    activations = ActivationSet(open_activation_set(run).store, plan, run.sites, wait=False)
    assert activations.exist(plan.heldout_units)
    assert activations.manifest(1).unit == 1
    activations.store.delete(manifest_key(1))
    assert not activations.exist(range(4))
    with pytest.raises(ObjectNotFoundError, match=r"units/00000001\.json"):
        activations.manifest(1)


def test_a_reader_of_limited_patience_ends_when_no_producer_is_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A reader with limited patience waits while a producer works, and logs this once."""
    monkeypatch.setattr(dist_sae.data.activation_set, "POLL_SECONDS", (0.0, 0.001))
    caplog.set_level("INFO")
    run = make_run(tmp_path)
    plan = fill(run, RowNumbers(), monkeypatch)

    class Aged(Wrapped):
        looks = 0

        def entries(self, prefix: str = "") -> Iterator[Entry]:
            if prefix.startswith("claims/"):
                self.looks += 1
                if self.looks <= 6:  # the claim disappears only after the patience has run out
                    yield Entry("claims/00000016.json", 0, 1.0)
            for entry in super().entries(prefix):
                yield entry._replace(age_seconds=1e4)

    store = Aged(open_activation_set(run).store)
    store.delete(manifest_key(16))
    activations = ActivationSet(store, plan, run.sites, patience_seconds=0.2)
    with pytest.raises(UnitMissingError, match="unit 16 does not exist, and no producer has shown"):
        list(activations.heldout_rows(1))
    assert store.looks > 6
    assert caplog.text.count("waiting for unit 16") == 1
