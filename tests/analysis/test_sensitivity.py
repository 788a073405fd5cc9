"""Sensitivity and precision on planted data."""

import numpy as np
import pytest
from numpy.typing import NDArray

from dist_sae.analysis.passages import Judged
from dist_sae.analysis.sensitivity import Measured, measure, sensitivity
from dist_sae.errors import ArgumentError

DOCUMENTS, EACH = 200, 20
KEYWORD, OTHER, ALARM = 0.9, 0.5, 0.01
"""Probability of firing on the concept inside the filter, outside the filter, and elsewhere."""


def world(recall: float, seed: int, share: float = 0.2) -> tuple[Judged, float, float]:
    """Return a drawn sample with its true sensitivity and precision.

    10 % of passages have the concept on average, but documents differ. The latent fires more often
    on concept passages inside the filter, as if both relied on the same words.
    """
    generator = np.random.default_rng(seed)
    document = np.repeat(np.arange(DOCUMENTS), EACH)
    has = generator.random(len(document)) < generator.beta(1, 9, DOCUMENTS)[document]
    in_filter = generator.random(len(document)) < np.where(has, recall, 0.02)
    chance = np.where(has, np.where(in_filter, KEYWORD, OTHER), ALARM)
    act = np.where(generator.random(len(document)) < chance, 1, 0).astype(np.float32)
    kept = in_filter | (generator.random(len(document)) < share)
    weight = np.where(in_filter, 1, 1 / share)
    judged = Judged(document, np.where(has, 3, 0).astype(np.int8), act, weight, in_filter)
    right = recall * KEYWORD + (1 - recall) * OTHER
    return (
        Judged(
            judged.document[kept],
            judged.level[kept],
            judged.act[kept],
            judged.weight[kept],
            judged.in_filter[kept],
        ),
        right,
        0.1 * right / (0.1 * right + 0.9 * ALARM),
    )


def holds(low: float | None, value: float, high: float | None) -> bool:
    assert low is not None
    assert high is not None
    return low <= value <= high


@pytest.mark.parametrize("recall", [0.2, 0.6, 1.0])
def test_intervals_cover_the_truth_however_poor_the_filter(recall: float) -> None:
    """95 % intervals contain the truth in at least 92 % of 200 samples, even for a poor filter."""
    covered = np.zeros(3)
    for seed in range(200):
        judged, right, precision = world(recall, seed)
        found = measure(0, "made", 1.0, judged, seed)
        at = found.at[0]
        assert found.filter_recall is not None
        covered += [
            holds(at.sensitivity.low, right, at.sensitivity.high),
            holds(at.precision.low, precision, at.precision.high),
            holds(found.filter_recall.low, recall, found.filter_recall.high),
        ]
    assert (covered >= 0.92 * 200).all(), covered


def test_the_naive_estimate_is_biased_and_the_weighted_one_is_not() -> None:
    weighted, naive = [], []
    for seed in range(40):
        judged, right, _ = world(0.2, seed)
        found = measure(0, "made", 1.0, judged, seed)
        assert found.naive is not None
        weighted.append(found.at[0].sensitivity.value)
        naive.append(found.naive[0].sensitivity.value)
    assert np.mean(np.array(weighted, float)) == pytest.approx(right, abs=0.02)
    assert np.mean(np.array(naive, float)) == pytest.approx(KEYWORD, abs=0.02)
    assert right == pytest.approx(0.58)


def census(act: NDArray[np.float32], has: NDArray[np.bool_], documents: int = 500) -> Measured:
    n = len(act)
    document = np.random.default_rng(0).integers(0, documents, n)
    level = np.where(has, 3, 0).astype(np.int8)
    judged = Judged(document, level, act, np.ones(n), np.ones(n, np.bool_))
    return measure(0, "made", float(act.max()), judged)


@pytest.mark.parametrize("of_parent", [0.1, 0.4, 0.8])
def test_absorption_shows_as_lost_sensitivity(of_parent: float) -> None:
    """A parent latent silent where its child fires has sensitivity 1 - P(child | parent)."""
    generator = np.random.default_rng(1)
    parent = generator.random(100_000) < 0.1
    child = parent & (generator.random(100_000) < of_parent)
    act = np.where(parent & ~child, generator.uniform(1, 2, 100_000), 0).astype(np.float32)
    at = census(act, parent).at[0]
    assert at.sensitivity.value == pytest.approx(1 - of_parent, abs=0.02)
    assert at.precision.value == 1


def test_thresholds_areas_and_levels_are_those_worked_by_hand() -> None:
    """Thresholds, areas and levels match values worked out by hand.

    Each level has ten passages. Activations are 0 or 2 on level 0, 0 on level 1, 8 on level 2, and
    8 or 10 on level 3.
    """
    level = np.repeat(np.arange(4, dtype=np.int8), 10)
    act = np.array([0, 2] * 5 + [0] * 10 + [8] * 10 + [8, 10] * 5, np.float32)
    judged = Judged(np.arange(40), level, act, np.ones(40), np.ones(40, np.bool_))
    found = measure(0, "made", 20.0, judged)
    assert [at.sensitivity.value for at in found.at] == [1, 1, 0]  # at thresholds 0, 2 and 10
    # 20 of 25, 20 of 20, and none fire
    assert [at.precision.value for at in found.at] == [0.8, 1, None]
    assert found.at[0].f1.value == pytest.approx(40 / 45)
    assert found.auroc.value == 1
    assert found.means == [1, 0, 8, 9]
    assert (found.naive, found.filter_recall) == (None, None)


def test_the_area_is_the_chance_of_the_larger_activation_with_weights_and_ties() -> None:
    generator = np.random.default_rng(2)
    act = generator.integers(0, 5, 200).astype(np.float32)
    has = generator.random(200) < 0.3
    weight = generator.uniform(1, 9, 200)
    level = np.where(has, 3, 0).astype(np.int8)
    judged = Judged(np.arange(200), level, act, weight, np.ones(200, np.bool_))
    pairs = weight[has][:, None] * weight[~has]
    larger = (act[has][:, None] > act[~has]) + 0.5 * (act[has][:, None] == act[~has])
    expected = float((pairs * larger).sum() / pairs.sum())
    found = measure(0, "made", 5.0, judged).auroc
    assert found.value == pytest.approx(expected)
    # the interval estimates the spread over samples of 200 drawn from a large population
    assert found.low is not None
    assert found.high is not None
    assert 0.1 < found.high - found.low < 0.35


def test_intervals_draw_documents_whole() -> None:
    """Intervals resample whole documents, so the number of passages does not narrow them.

    Half of 40 documents fire on every passage, which gives a standard error of sqrt(.25 / 40).
    """
    document = np.repeat(np.arange(40), 100)
    has = np.arange(4000) % 2 == 0
    act = (document % 2).astype(np.float32)
    level = np.where(has, 3, 0).astype(np.int8)
    judged = Judged(document, level, act, np.ones(4000), np.ones(4000, np.bool_))
    found = measure(0, "made", 1.0, judged).at[0].sensitivity
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.079, rel=0.15)


def test_shuffled_passages_say_nothing() -> None:
    """With activations of other passages, nothing is found beyond chance."""
    generator = np.random.default_rng(3)
    has = generator.random(20_000) < 0.05
    act = np.where(has, 2, 0) * (generator.random(20_000) < 0.8)
    real = census(act.astype(np.float32), has)
    shuffled = census(generator.permutation(act).astype(np.float32), has)
    findings = sensitivity([real, shuffled])
    assert [each["tells"] for each in findings.numbers["asked"]] == [True, False]
    nothing = "latent 0, made: nothing found: it does not detect the concept better than chance"
    assert findings.summary.count(nothing) == 1
    assert findings.tables["thresholds"].num_rows == 6


@pytest.mark.parametrize(("as_good", "stands"), [(0, True), (4, True), (5, False)])
def test_a_latent_stands_out_if_few_others_are_as_good(as_good: int, *, stands: bool) -> None:
    """A latent stands out if p = (1 + others as good) / (others + 1) is at most .05.

    There are 99 others, so four may be as good. The latent's F1 is 1, 1 and .67 at the thresholds.
    """
    has = np.arange(400) % 4 == 0
    act = np.where(has, np.where(np.arange(400) % 8 == 0, 3, 1), 0).astype(np.float32)
    level = np.where(has, 3, 0).astype(np.int8)
    peers = np.array([1.0] * as_good + [0.999] * (99 - as_good))
    judged = Judged(np.arange(400), level, act, np.ones(400), np.ones(400, np.bool_), peers)
    found = measure(0, "made", 3.0, judged)
    assert (found.peers, found.as_good) == (99, as_good)
    findings = sensitivity([found])
    assert findings.numbers["asked"][0]["stands_out"] is stands
    assert any("nothing found beyond other latents" in line for line in findings.summary) != stands


def test_with_few_other_latents_it_is_not_told_whether_it_stands_out() -> None:
    has = np.arange(400) % 4 == 0
    found = census(has.astype(np.float32), has)
    findings = sensitivity([found], ["of the judge"])
    assert findings.caveats[0] == "of the judge"
    assert "only 0 other latents fire, too few to tell" in findings.caveats[1]


def test_what_no_drawn_passage_shows_may_still_be_there() -> None:
    """Concept passages may exist outside the filter even if none was drawn there.

    100 passages inside the filter have the concept. Passages outside are drawn with probability
    .1, and none of these has it.
    """
    has = np.repeat([True, False], [100, 500])
    in_filter = has.copy()
    weight = np.where(in_filter, 1.0, 10.0)
    act = (has & (np.arange(600) % 2 == 0)).astype(np.float32)
    level = np.where(has, 3, 0).astype(np.int8)
    found = measure(0, "made", 1.0, Judged(np.arange(600), level, act, weight, in_filter))
    # there may be up to 3 / .1 unseen ones in addition to the 100
    assert found.filter_recall is not None
    assert found.filter_recall.value == found.filter_recall.high == 1
    assert found.filter_recall.low == pytest.approx(100 / 130)
    sensitive = found.at[0].sensitivity
    assert sensitive.value == 0.5
    assert sensitive.low is not None
    assert sensitive.high is not None
    assert sensitive.low == pytest.approx(0.40 * 100 / 130, abs=0.03)
    assert found.naive is not None
    assert found.naive[0].sensitivity.low == pytest.approx(0.40, abs=0.03)
    assert sensitive.high == pytest.approx((0.60 * 100 + 30) / 130, abs=0.03)
    (line,) = (line for line in sensitivity([found]).caveats if "outside" in line)
    assert "only 0 of the passages drawn outside the filter have the concept" in line


@pytest.mark.parametrize("positives", [3, 97])
def test_too_few_passages_of_a_kind_are_refused_with_the_number(positives: int) -> None:
    with pytest.raises(ArgumentError, match=f"made: {positives} of 100 judged passages have the"):
        census(np.ones(100, np.float32), np.arange(100) < positives)
