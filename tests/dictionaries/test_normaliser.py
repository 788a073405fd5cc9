"""Normalizers of several sites: scaled rows side by side, and what a checkpoint stores of them."""

import json

import torch

from dist_sae.dictionaries.interface import Widths
from dist_sae.dictionaries.normaliser import Normaliser, SiteNormalisers, scales_of


def of_mean(scale: float, *mean: float) -> Normaliser:
    return Normaliser(scale, torch.tensor(mean, dtype=torch.float64), 0.1 + scale, 7)


A, B, C = of_mean(0.5, 1 / 3, -2.0), of_mean(2.0, 5.0), of_mean(3.0, 6.0, 7.0, 8.0)
ACTS = {
    "a": torch.tensor([[2.0, 4.0], [6.0, 8.0]]),
    "b": torch.tensor([[1.0], [2.0]]),
    "c": torch.ones(2, 3, dtype=torch.bfloat16),
}


def test_a_site_of_its_own_is_scaled_once_for_inputs_and_targets() -> None:
    normalisers = SiteNormalisers(("a",), ("a",), {"a": A})
    rows = normalisers.rows(ACTS)
    assert rows.inputs is rows.targets
    assert rows.inputs.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert ACTS["a"].tolist() == [[2.0, 4.0], [6.0, 8.0]]  # the batch is not modified


def test_sites_are_scaled_each_and_stand_side_by_side_in_their_order() -> None:
    normalisers = SiteNormalisers(("b", "a"), ("c", "b"), {"b": B, "a": A, "c": C})
    rows = normalisers.rows(ACTS)
    assert rows.inputs.tolist() == [[2.0, 1.0, 2.0], [4.0, 3.0, 4.0]]
    assert rows.targets.tolist() == [[3.0, 3.0, 3.0, 2.0], [3.0, 3.0, 3.0, 4.0]]
    assert rows.targets.dtype == torch.float32
    assert normalisers.widths == Widths((1, 2), (3, 1))
    assert normalisers.mean.tolist() == [6.0, 7.0, 8.0, 5.0]
    assert normalisers.variance == C.variance + B.variance
    assert normalisers.columns == {"c": slice(0, 3), "b": slice(3, 4)}


def test_one_site_is_stored_as_it_always_was() -> None:
    scalars = SiteNormalisers(("a",), ("a",), {"a": A}).to_scalars()
    assert scalars == {"scale": 0.5, "mean": [1 / 3, -2.0], "variance": 0.6, "rows": 7}
    stored = {**json.loads(json.dumps(scalars)), "plan": "p", "places": {}}
    again = SiteNormalisers.from_scalars(stored, ("a",), ("a",))
    assert again.to_scalars() == scalars
    assert scales_of(stored) == {"scale": 0.5}


def test_several_sites_are_stored_and_read_exactly() -> None:
    normalisers = SiteNormalisers(("b", "a"), ("c",), {"b": B, "a": A, "c": C})
    stored = {**json.loads(json.dumps(normalisers.to_scalars(), sort_keys=True)), "plan": "p"}
    again = SiteNormalisers.from_scalars(stored, ("b", "a"), ("c",))
    assert again.to_scalars() == normalisers.to_scalars()
    assert list(again.by_site) == ["b", "a", "c"]


def test_a_child_keeps_the_scale_of_each_of_its_parents_sites() -> None:
    parent = SiteNormalisers(("a",), ("b",), {"a": A, "b": B})
    own = SiteNormalisers(("a",), ("b",), {"a": of_mean(1.0, 3.0, 9.0), "b": of_mean(4.0, 8.0)})
    child = own.at_scales(scales_of({**parent.to_scalars(), "plan": "p"}))
    assert [child.by_site[site].scale for site in "ab"] == [0.5, 2.0]
    assert child.by_site["a"].mean.tolist() == [1.5, 4.5]
    assert child.by_site["b"].mean.tolist() == [4.0]
