"""Shared latents of two dictionaries: the same one changed in known ways, or another one."""

from pathlib import Path

import pytest
import torch

from dist_sae.analysis.seeds import find_overlap
from dist_sae.config import Run
from dist_sae.dictionaries.base import Dictionary
from dist_sae.errors import ConfigError, NoIndexError
from tests.index.indexed import add_checkpoint, make_index, produced

DEAD = 5


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An indexed run of 64 latents, of which the last 5 are dead."""
    run = produced(tmp_path_factory.mktemp("seeds"), "relu")
    add_checkpoint(run)
    make_index(run)
    return run


def beside(run: Run, name: str, **options: object) -> Run:
    other = run.model_copy(update={"name": name})
    add_checkpoint(other, **options)  # type: ignore[arg-type]
    make_index(other)
    return other


@pytest.mark.system
def test_latents_are_found_again_in_another_order(first: Run) -> None:
    def permute(sae: Dictionary) -> None:
        order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
        for name in ("W_enc", "W_dec", "b_enc"):
            sae.get_parameter(name).data = sae.get_parameter(name).data[order]

    found = find_overlap(first, beside(first, "permuted", change=permute))
    assert (found.looked_at, found.partners, found.share) == (64 - DEAD, 64 - DEAD, 1)
    assert found.recapture == 64 - DEAD
    assert list(found.densities) == sorted(found.densities)
    assert all(low < 1 for low, _ in found.intervals)


def test_the_encoder_must_agree_as_well(first: Run) -> None:
    """Latents whose decoder rows agree but whose encoder rows do not are not partners.

    30 of the latents get another latent's encoder row.
    """

    def mix(sae: Dictionary) -> None:
        sae.W_enc.data[:30] = sae.W_enc.data[:30].roll(1, 0)

    found = find_overlap(first, beside(first, "mixed", change=mix))
    assert found.partners == 64 - DEAD - 30


def test_a_latent_is_the_partner_of_one(first: Run) -> None:
    """Two copies of a latent share one partner: only one copy is matched to it."""

    def copy(sae: Dictionary) -> None:
        for name in ("W_enc", "W_dec", "b_enc"):
            sae.get_parameter(name).data[1] = sae.get_parameter(name).data[0]

    doubled = beside(first, "doubled", change=copy)
    assert find_overlap(doubled, first).partners == 64 - DEAD - 1


def test_other_directions_have_no_partners(first: Run) -> None:
    found = find_overlap(first, beside(first, "other", seed=9))
    assert found.share < 0.1


def test_what_cannot_be_matched_is_named(first: Run, tmp_path: Path) -> None:
    bare = first.model_copy(update={"name": "bare"})
    add_checkpoint(bare)
    with pytest.raises(NoIndexError, match="bare: has no latent index of step 3 yet"):
        find_overlap(first, bare)
    elsewhere = first.model_copy(
        update={"name": "elsewhere", "sae": first.sae.model_copy(update={"writes": ("other",)})}
    )
    with pytest.raises(ConfigError, match="world and elsewhere: read or write different sites"):
        find_overlap(first, elsewhere)
