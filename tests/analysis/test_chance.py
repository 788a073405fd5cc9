"""Chance baseline: an untrained dictionary recovers no more words than its rotated copy."""

import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dist_sae.analysis import chance
from dist_sae.analysis.chance import WordComparison, compare_words, match_rotated
from dist_sae.analysis.coverage import cover_words, coverage
from dist_sae.analysis.indexed_run import IndexedRun, open_indexed_run
from dist_sae.analysis.matching import Matched, match_words
from dist_sae.analysis.words import Concept, WordRows
from dist_sae.config import Run
from dist_sae.config.data import SyntheticModel
from dist_sae.data.shard import read_block
from dist_sae.dictionaries.base import Dictionary
from dist_sae.errors import ConfigError
from dist_sae.models.synthetic import SyntheticSource
from tests.index.indexed import add_checkpoint, make_index, produced
from tests.world import open_activation_set

pytestmark = pytest.mark.system

D, FEATURES, LATENTS, F1 = 16, 60, 80, 0.5


class World(NamedTuple):
    """Rows labeled with their strongest feature as their word, and two indexed dictionaries."""

    words: WordRows
    ideal: IndexedRun
    random: IndexedRun
    activations: Path


def indexed(run: Run, name: str, directions: torch.Tensor) -> IndexedRun:
    """Return an indexed dictionary with the given encoder and decoder directions."""
    named = run.model_copy(update={"name": name})

    def plant(sae: Dictionary) -> None:
        for _, tensor in sae.tensors():
            tensor.data.zero_()
        sae.W_enc.data.copy_(directions)
        sae.W_dec.data.copy_(directions)
        assert isinstance(run.model, SyntheticModel)
        # at the scale of the test's checkpoints
        sae.b_dec.data.copy_(1.5 * SyntheticSource(run.model).bias)

    add_checkpoint(named, change=plant)
    make_index(named)
    return open_indexed_run(named)


def random_directions(seed: int) -> torch.Tensor:
    rows = torch.randn(LATENTS, D, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("chance")
    run = produced(
        folder,
        model={"d_in": D, "n_features": FEATURES, "l0": 2, "zipf": 0.5},
        corpus={"documents": 150},
        sae={"kind": "topk", "n_latents": LATENTS, "k": 2, "auxk": 7},
    )
    assert isinstance(run.model, SyntheticModel)
    source = SyntheticSource(run.model)
    planted = random_directions(1)
    planted[:FEATURES] = source.directions
    ideal = indexed(run, "ideal", planted)
    random = indexed(run, "random", random_directions(2))
    activations = open_activation_set(run)
    concepts, starts = [], [0]
    for unit in ideal.index.manifest.units:
        shard = activations.manifest(unit).sites[run.site]
        rows = [read_block(activations.store, shard, n).acts for n in range(len(shard.blocks))]
        along = (torch.cat(rows).float() - source.bias) @ source.directions.T
        best = along.max(1)
        concepts.append(torch.where(best.values > 0.6, best.indices, -1).numpy())
        starts.append(starts[-1] + len(along))
    concept = np.concatenate(concepts)
    there = np.flatnonzero(concept >= 0)
    words = WordRows(there, concept[there].astype(np.int32), there >= 0, np.array(starts))
    return World(words, ideal, random, Path(run.store.activations.removeprefix("file://")))


def matched(world: World, dictionary: IndexedRun) -> Matched:
    return match_words(dictionary.index, world.words, FEATURES)


def compared(world: World, dictionary: IndexedRun, seed: int = 0) -> WordComparison:
    n, own, rotated = match_rotated(
        dictionary, world.words, FEATURES, matched(world, dictionary), seed
    )
    return compare_words("chance", n, own.judged, own.recovered(F1), rotated.recovered(F1))


def test_a_dictionary_of_the_features_has_words_that_chance_has_not(world: World) -> None:
    found = compared(world, world.ideal)
    assert found.words > 40
    assert found.found > 0.8 * found.words
    assert found.found > found.by_other + 15
    assert found.is_more


def test_an_untrained_dictionary_has_words_and_no_more_than_chance(world: World) -> None:
    """An untrained dictionary recovers some words, but not significantly more than chance.

    There are many words and few dimensions, so chance recovers some too. Three rotations are tried.
    """
    own = matched(world, world.random)
    assert own.recovered(F1).sum() >= 5
    found = [compared(world, world.random, seed) for seed in range(3)]
    assert min(each.by_other for each in found) >= 3
    assert not any(each.is_more for each in found)


def test_the_answer_for_an_untrained_dictionary_is_nothing(world: World) -> None:
    concepts = [Concept(str(number), "features") for number in range(FEATURES)]
    frequency = np.bincount(world.words.concept, minlength=FEATURES) / world.words.starts[-1]
    answers = []
    for dictionary in (world.ideal, world.random):
        others = [compared(world, dictionary)]
        table = concepts, frequency, matched(world, dictionary), F1, others
        covered = cover_words("made", dictionary.index.firings, 10**9, *table)
        answers.append(coverage([covered], []))
    told = [answer.numbers["runs"]["made"]["nothing"] for answer in answers]
    assert told == [False, True]
    assert not any("nothing" in line for line in answers[0].summary)
    assert "made: nothing found beyond chance: on " in answers[1].summary[1]
    assert answers[1].summary[2] == "made: no curve: not significantly more words than a control"


def test_a_copy_turned_by_nothing_is_the_dictionary(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.linalg, "qr", lambda x: (torch.eye(len(x)), None))
    own = matched(world, world.ideal)
    _, same, rotated = match_rotated(world.ideal, world.words, FEATURES, own)
    assert same is own
    assert rotated.matches == own.matches


def test_few_rows_are_compared_on_the_same_rows(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.linalg, "qr", lambda x: (torch.eye(len(x)), None))
    monkeypatch.setattr(chance, "CHANCE_ROWS", 1000)
    n, own, rotated = match_rotated(world.ideal, world.words, FEATURES, matched(world, world.ideal))
    assert 350 < n <= 1000
    assert n in world.words.starts
    assert own.occurrences.sum() == np.searchsorted(world.words.rows, n)
    assert own.matches == rotated.matches


def test_without_the_rows_chance_is_unknown(world: World) -> None:
    hidden = world.activations.with_name("hidden")
    shutil.move(world.activations, hidden)
    try:
        with pytest.raises(ConfigError, match="so the chance baseline cannot be computed"):
            compared(world, world.ideal)
    finally:
        shutil.move(hidden, world.activations)


def flags(*counts: int) -> NDArray[np.bool_]:
    return np.repeat([True, False], counts)


def test_p_values_are_those_of_the_sign_test() -> None:
    """P-values are those of a one-sided sign test.

    Of 6 words that only one of the two recovers, 5 are ours: (6 + 1) / 64. Of 2,000, 1,100 are
    ours: 4.5 standard deviations.
    """
    own, other = flags(15, 6), np.concatenate([flags(10, 5), flags(1, 5)])
    found = compare_words("x", 1, np.ones(21, np.bool_), own, other)
    assert (found.found, found.by_other, found.both) == (15, 11, 10)
    assert found.p_value == pytest.approx(7 / 64)
    assert WordComparison("x", 1, 50, 0, 0, 0).p_value == 1
    large = WordComparison("x", 1, 3000, 1100, 900, 0)
    # exact value, computed with another program
    assert large.p_value == pytest.approx(4.2e-6, rel=0.1)
