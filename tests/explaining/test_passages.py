"""The passages that a latent is explained and judged on."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dist_sae.config import Run
from dist_sae.data.plan import load_plan
from dist_sae.errors import CorpusError
from dist_sae.explaining.passages import PassageSampler, PassageSettings, SampledPassages
from dist_sae.index.query import Index
from dist_sae.index.texts import Texts
from dist_sae.storage import open_store
from tests.explaining.words import FIRES_ON, LENGTH, documents, word, words_run

SETTINGS = PassageSettings(tokens=LENGTH, shown=20, per_decile=2, silent=15)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return words_run(tmp_path_factory.mktemp("words"))


def sampler(run: Run, settings: PassageSettings = SETTINGS, seed: int = 0) -> PassageSampler:
    texts = Texts(run, load_plan(open_store(run.store.activations), run))
    return PassageSampler(Index(open_store(run.store.runs), run.name), texts, settings, seed)


@pytest.fixture(scope="module")
def sampled(run: Run) -> list[SampledPassages]:
    made = sampler(run)
    return [made.sample(latent) for latent in range(len(FIRES_ON))]


def largest(latent: int, document: list[int]) -> float:
    return max(FIRES_ON[latent].get(n, 0.0) for n in document)


@pytest.mark.system
def test_passages_have_the_text_and_the_activations(sampled: list[SampledPassages]) -> None:
    for latent, found in enumerate(sampled):
        for passage in (*found.shown, *found.judged):
            words = documents()[passage.document]
            assert passage.position == 0
            assert passage.tokens == [f" {word(n)}" for n in words]
            expected = [FIRES_ON[latent].get(n, 0.0) for n in words]
            np.testing.assert_allclose(passage.acts, expected, rtol=1e-3)


def test_no_passage_is_both_shown_and_judged(sampled: list[SampledPassages]) -> None:
    for latent, found in enumerate(sampled):
        places = [passage.document for passage in (*found.shown, *found.judged)]
        assert len(places) == len(set(places)), latent


def test_active_passages_are_drawn_evenly_from_deciles(sampled: list[SampledPassages]) -> None:
    """60 documents fire latent 0.

    The 30 with w11 all have activation 1, and these ties fill deciles 0 to 4.
    """
    active = [passage for passage in sampled[0].judged if passage.kind == "active"]
    assert Counter(passage.decile for passage in active) == dict.fromkeys(range(10), 2)
    for passage in active:
        assert passage.decile is not None
        assert largest(0, documents()[passage.document]) == (1.0 if passage.decile < 5 else 2.0)
    assert sampled[0].active == 60


def test_the_explainer_sees_the_most_active_first_and_some_of_each_decile(
    sampled: list[SampledPassages],
) -> None:
    """The explainer gets 40 passages that the judge does not see, 4 of each decile.

    The ten with the largest activations are in deciles 7, 8 and 9. Deciles 0 to 7 supply one more
    each, and two more in total.
    """
    acts = [max(passage.acts) for passage in sampled[0].shown]
    assert acts == sorted(acts, reverse=True)
    assert len(acts) == 20
    counts = Counter(passage.decile for passage in sampled[0].shown)
    assert set(counts) == set(range(10))
    assert (counts[8], counts[9]) == (4, 4)
    assert 5 <= sum(counts[decile] for decile in range(5)) <= 7


def test_silent_passages_are_silent_and_near_misses_fire_a_near_latent(
    sampled: list[SampledPassages],
) -> None:
    found = {kind: [p for p in sampled[0].judged if p.kind == kind] for kind in ("random", "near")}
    assert (len(found["random"]), len(found["near"])) == (15, 15)
    for kind, passages in found.items():
        for passage in passages:
            assert largest(0, documents()[passage.document]) == 0, kind
    # latents 2 and 5 are near, and 5 fires everywhere, so half of the near misses fire latent 2
    assert sum(13 in documents()[p.document] for p in found["near"]) >= 7


def test_half_of_few_passages_are_judged(sampled: list[SampledPassages]) -> None:
    """Nine documents fire latent 3: four of different deciles are judged, and five are shown."""
    active = [passage for passage in sampled[3].judged if passage.kind == "active"]
    assert (len(active), len(sampled[3].shown), sampled[3].active) == (4, 5, 9)
    assert len({passage.decile for passage in active}) == 4


def test_a_latent_that_is_never_or_always_active_lacks_passages_of_a_kind(
    sampled: list[SampledPassages],
) -> None:
    assert (sampled[4].shown, {p.kind for p in sampled[4].judged}) == ([], {"random"})
    assert {p.kind for p in sampled[5].judged} == {"active"}


def test_the_same_passages_are_drawn_again(run: Run, sampled: list[SampledPassages]) -> None:
    again = sampler(run)
    assert [again.sample(latent) for latent in (2, 0)] == [sampled[2], sampled[0]]
    assert sampler(run, seed=1).sample(0) != sampled[0]


def test_pieces_of_documents_are_passages_of_their_own(run: Run) -> None:
    """A document is cut into two passages of four tokens; only the one with the word is active."""
    found = sampler(run, SETTINGS._replace(tokens=4, silent=150)).sample(1)
    halves = [p for p in found.judged if 12 in documents()[p.document] and p.kind != "active"]
    assert halves
    for passage in (*found.shown, *found.judged):
        words = documents()[passage.document][passage.position : passage.position + 4]
        assert passage.tokens == [f" {word(n)}" for n in words]
        assert (12 in words) == (max(passage.acts) > 0)


def test_another_text_is_refused(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = sampler(run)
    monkeypatch.setattr(Texts, "tokens", lambda *_: [5] * LENGTH)
    with pytest.raises(
        CorpusError, match="is not the text that the activations were computed from"
    ):
        made.sample(0)
