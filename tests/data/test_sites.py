"""Several sites of an activation set, read together: the same rows in the same order."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.plan import Plan
from dist_sae.errors import CorruptObjectError
from dist_sae.producing.planner import plan
from dist_sae.storage import ObjectStore, open_store
from tests.runs import make_run
from tests.world import Wrapped, joined, open_loader, open_stream, same, write_unit

WIDTHS = {"narrow": 2, "wide": 5, "unread": 3}


def numbered(unit: int, n: int) -> dict[str, Tensor]:
    """Return a unit's rows at all sites.

    Column 0 is the row's number. The other columns are the width of the site.
    """
    acts = {site: torch.full((n, width), float(width)) for site, width in WIDTHS.items()}
    for of_site in acts.values():
        of_site[:, 0] = 1000 * unit + torch.arange(n)
    return acts


@pytest.fixture
def world(tmp_path: Path) -> tuple[ObjectStore, Plan]:
    """16 training units of 90 to 105 rows in blocks of 8, and 4 streams with windows of 3 units."""
    run = make_run(tmp_path)
    made, store = plan(run), open_store(run.store.activations)
    for unit in range(len(made.units)):
        write_unit(store, made, unit, numbered(unit, 90 + unit))
    return store, made


@pytest.mark.parametrize("start", [0, 7, 23], ids=["begin", "within a block", "in a second pass"])
def test_a_batch_has_the_rows_of_one_site_alone_at_all_sites(
    world: tuple[ObjectStore, Plan], start: int
) -> None:
    """Batches of two sites have the same rows and cursors as batches of one site, on 1 and 2 ranks.

    No other site is in the batch.
    """
    both, steps = ActivationSet(*world, ("wide", "narrow")), range(start, 30)
    with open_loader(ActivationSet(*world, ("narrow",)), steps, passes=2) as loader:
        alone = list(loader)
    for ranks in (1, 2):
        parts = []
        for rank in range(ranks):
            with open_loader(both, steps, world=ranks, rank=rank, passes=2) as loader:
                parts.append(list(loader))
        for expected, *batches in zip(alone, *parts, strict=True):
            assert all(list(batch.acts) == ["wide", "narrow"] for batch in batches)
            narrow, wide = (
                torch.cat([batch.acts[site] for batch in batches]) for site in ("narrow", "wide")
            )
            assert torch.equal(narrow, expected.acts["narrow"])
            assert torch.equal(wide[:, 0], narrow[:, 0])
            assert (wide[:, 1:] == 5).all()
            assert {v: c for batch in batches for v, c in batch.cursors.items()} == expected.cursors


def test_rows_read_again_are_the_same_at_all_sites(world: tuple[ObjectStore, Plan]) -> None:
    """Repeated rows at the end of a stream are the same at all sites.

    The streams have 384, 388, 392 and 396 rows in a pass, and 25 batches take 400 from each.
    """
    with open_loader(ActivationSet(*world, ("narrow", "wide")), range(25)) as loader:
        batches = list(loader)
    assert sum(batch.repeated_rows for batch in batches) == 16 + 12 + 8 + 4
    for batch in batches:
        assert torch.equal(batch.acts["narrow"][:, 0], batch.acts["wide"][:, 0])


def test_a_manifest_is_read_once_for_all_sites(world: tuple[ObjectStore, Plan]) -> None:
    """Each manifest is read once for all sites.

    There are four: the three units of the first window, and the next window's unit, which is opened
    ahead.
    """

    class Asked(Wrapped):
        manifests = 0

        def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
            self.manifests += key.startswith("units/")
            return super().get(key, start, stop)

    store, made = Asked(world[0]), world[1]
    with ThreadPoolExecutor(2) as pool:
        stream = open_stream(ActivationSet(store, made, ("narrow", "wide")), 0, pool)
        stream.put({"narrow": torch.empty(282, 2), "wide": torch.empty(282, 5)})
    assert store.manifests == 4


def test_blocks_of_all_sites_hold_the_same_rows_up_to_the_limit(
    world: tuple[ObjectStore, Plan],
) -> None:
    activations = ActivationSet(*world, ("narrow", "wide"))
    blocks = list(activations.rows([1, 3], 100))
    narrow, wide = (torch.cat([block[site] for block in blocks]) for site in ("narrow", "wide"))
    assert len(narrow) == 100
    assert torch.equal(narrow[:, 0], wide[:, 0])
    alone = joined(activations.with_sites("wide").rows([1, 3], 100))
    assert same([wide], [alone])


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (1, r"units/00000000.json: has 90 rows of narrow in 12 blocks, and 89 of wide in 12,"),
        (90, "units/00000000.json: has no site wide; delete it and produce the unit again"),
    ],
    ids=["fewer rows", "no rows"],
)
def test_a_unit_without_the_same_rows_at_all_sites_is_refused(
    world: tuple[ObjectStore, Plan], lost: int, said: str
) -> None:
    acts = numbered(0, 90)
    acts["wide"] = acts["wide"][lost:]
    if not len(acts["wide"]):
        del acts["wide"]
    write_unit(*world, 0, acts)
    both = ActivationSet(*world, ("narrow", "wide"))
    with open_loader(both, range(23)) as loader, pytest.raises(CorruptObjectError, match=said):
        list(loader)
    with open_loader(ActivationSet(*world, ("narrow",)), range(23)) as loader:
        assert len(list(loader)) == 23  # a reader of one site does not check the others
