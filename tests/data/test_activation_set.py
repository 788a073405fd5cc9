from pathlib import Path

import pytest
import torch

from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.shard import manifest_key
from dist_sae.errors import ObjectNotFoundError
from tests.runs import make_run
from tests.world import RowNumbers, Wrapped, fill, open_units


class Counting(Wrapped):
    gets = 0

    def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        self.gets += 1
        return super().get(key, start, stop)


def test_rows_end_with_the_limit_and_nothing_is_read_beyond_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Units 1 and 3 in this order; the limit is the first one's rows and one more, or its own."""
    run = make_run(tmp_path)
    fill(run, RowNumbers(), monkeypatch)
    store = Counting(open_units(run).store)
    activations = open_units(run, store=store)
    n, blocks = (
        activations.manifest(1).rows,
        [block.rows for block in activations.shard(activations.manifest(1)).blocks],
    )
    both = torch.cat(list(activations.rows([1, 3], 10**6)))
    assert both.dtype == torch.float32
    assert torch.equal(torch.cat(list(activations.rows([1, 3], n + 1))), both[: n + 1])
    store.gets = 0
    assert torch.equal(torch.cat(list(activations.rows([1, 3], n))), both[:n])
    assert store.gets == 1 + len(blocks)
    heldout = torch.cat(list(activations.heldout_rows(10**6)))
    assert len(heldout) == sum(activations.manifest(u).rows for u in activations.plan.heldout_units)


def test_a_reader_that_does_not_wait_names_the_missing_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    plan = fill(run, RowNumbers(), monkeypatch)
    activations = ActivationSet(open_units(run).store, plan, run.site, wait=False)
    assert activations.exist(plan.heldout_units)
    assert activations.manifest(1).unit == 1
    activations.store.delete(manifest_key(1))
    assert not activations.exist(range(4))
    with pytest.raises(ObjectNotFoundError, match=r"units/00000001\.json"):
        activations.manifest(1)
