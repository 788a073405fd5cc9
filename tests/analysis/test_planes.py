"""Separability and mixture index of planes whose values are known."""

import numpy as np
import pytest
from numpy.typing import NDArray

from dist_sae.analysis.planes import measure_plane, mixture, separability, separability_p_value
from dist_sae.analysis.shape import scaling, two_nn

N = 1000


def circle(draw: np.random.Generator, noise: float = 0.05) -> NDArray[np.float64]:
    angle = draw.uniform(0, 2 * np.pi, N)
    return np.stack([np.cos(angle), np.sin(angle)], 1) + noise * draw.standard_normal((N, 2))


def exclusive(draw: np.random.Generator) -> NDArray[np.float64]:
    first = draw.random(N) < 0.5
    acts = draw.normal(1, 0.25, N)
    return np.stack([np.where(first, acts, 0), np.where(first, 0, acts)], 1)


def test_a_circle_scores_above_a_mixture_above_independent_features() -> None:
    ordered = 0
    for seed in range(100):
        draw = np.random.default_rng(seed)
        scores = [
            measure_plane(points).score
            for points in (circle(draw), exclusive(draw), draw.random((N, 2)))
        ]
        assert scores[0] >= 0.8
        assert scores[2] <= 0.1
        ordered += scores[0] > scores[1] > scores[2]
    assert ordered >= 99


def test_values_that_can_be_worked_out() -> None:
    draw = np.random.default_rng(0)
    corners = 2 * np.pi * draw.integers(0, 7, N) / 7
    seven = np.stack([np.cos(corners), np.sin(corners)], 1)
    assert mixture(seven) == pytest.approx(2 / 7, abs=0.04)  # a line through two of seven corners
    assert mixture(exclusive(draw)) == pytest.approx(0.5, abs=0.05)  # one of the two features
    large = draw.random((200_000, 2))
    assert separability(large) < 2e-3
    # without the bias correction it would be 81 / (2 x 1,000 x ln 2) = 0.06 bits on average; the
    # least over 25 angles would be somewhat lower
    few = [separability(draw.standard_normal((N, 2))) for _ in range(20)]
    assert np.mean(few) < 0.01


def test_shuffled_coordinates_reach_what_independent_ones_have() -> None:
    draw = np.random.default_rng(0)
    assert separability_p_value(circle(draw), 39, draw) == 1 / 40
    independent = [separability_p_value(draw.random((200, 2)), 39, draw) for _ in range(20)]
    assert np.mean(np.array(independent) <= 0.05) < 0.3


@pytest.mark.parametrize("dimension", [1, 2, 4])
def test_the_dimension_of_a_sphere_is_found(dimension: int) -> None:
    draw = np.random.default_rng(dimension)
    points = draw.standard_normal((500, dimension + 1)) @ draw.standard_normal((dimension + 1, 9))
    assert two_nn(points) == pytest.approx(dimension, rel=0.2)
    assert two_nn(points[:1].repeat(500, axis=0)) is None


def test_a_direction_that_turns_with_the_length_is_seen() -> None:
    draw = np.random.default_rng(0)
    length = draw.uniform(1, 2, N)
    turned = np.stack([length * np.cos(length), length * np.sin(length)], 1)
    value = scaling(turned)
    assert value is not None
    assert value > 0.95
    value = scaling(circle(draw, 0.0) * length[:, None])
    assert value is not None
    assert value < 0.02
