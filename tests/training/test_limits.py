"""The sentence that states what limits a run."""

import pytest

from dist_sae.training.limits import describe_limit, describe_slow

BUSY = {"wait": 0.2, "forward": 5.0, "backward": 3.0, "optimiser": 1.0, "save": 0.0, "rest": 0.8}


@pytest.mark.parametrize(
    ("phases", "product", "stage", "said"),
    [
        ({}, None, None, "data: no producer has reported yet"),
        ({}, None, "forward", "data: producers' slowest stage: forward"),
        (
            BUSY | {"wait": 10.0},  # 10 of 19.8 s
            0.9,
            "store",
            "data: trainers wait 51% of the time; producers' slowest stage: store",
        ),
        (BUSY | {"wait": 10.0}, 0.9, None, "data: trainers wait 51% of the time"),
        (BUSY | {"save": 2.5}, 0.6, "store", "saving: training is paused 20% of the time"),
        (BUSY, 0.55, "store", "the encoder product: 55% of step time"),
        (BUSY, 0.3, "store", "the forward pass: 50% of step time; the encoder product: 30%"),
        (
            BUSY | {"ranks": 6.0, "begin": 90.0},  # 6 of 16 s since the start
            0.3,
            "store",
            "waiting for other ranks: 38% of step time; the encoder product: 30%",
        ),
        ({"rest": 1.0}, None, None, "other work in a step: 100% of step time"),
    ],
)
def test_the_limit_is_what_would_have_to_be_faster(
    phases: dict[str, float], product: float | None, stage: str | None, said: str
) -> None:
    assert describe_limit(phases, product, stage) == said
    assert len(said) <= 72  # fits on a terminal after "limit: "


def test_a_slow_rank_is_named_with_its_host_where_others_wait_for_it() -> None:
    slow = describe_slow("3", "run-trainer-0-1 on gpu-7", 1.31)
    assert slow == "rank 3 (run-trainer-0-1 on gpu-7) takes 1.3 x the median rank's time"
    assert describe_slow("3", "here", 1.19) is None
    waiting = BUSY | {"ranks": 2.5}  # 2.5 of 12.5 s
    said = describe_limit(waiting, 0.6, "store", slow)
    assert said == f"{slow}; ranks wait 20% of the time"
    assert describe_limit(BUSY, 0.55, "store", slow).startswith("the encoder product")
    assert describe_limit(waiting | {"wait": 50.0}, 0.6, None, slow).startswith("data: ")


def test_producers_that_are_done_are_not_the_limit() -> None:
    waiting = describe_limit(BUSY | {"wait": 10.0}, 0.9, "store", all_produced=True)
    assert waiting == "the store: all units exist, but trainers wait for reads 51% of the time"
    assert len(waiting) <= 72
    assert describe_limit({}, None, "store", all_produced=True).startswith("the trainers: ")
