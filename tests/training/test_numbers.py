"""The numbers that a step reports about the dictionary match values worked out by hand."""

import logging

import pytest
import torch

from dist_sae.dictionaries.axis import WHOLE
from dist_sae.dictionaries.interface import LossTerms, Output, Routing
from dist_sae.dictionaries.normaliser import Normaliser, SiteNormalisers
from dist_sae.telemetry.metric import QUANTILES
from dist_sae.training.numbers import (
    batch_numbers,
    expert_numbers,
    prefix_fvus,
    site_fvus,
    starved_share,
)
from dist_sae.training.reporter import ExpertLoads


def test_explained_variance_is_of_rows_and_about_the_mean_of_the_data() -> None:
    mean = torch.tensor([1.0, 0.0], dtype=torch.float64)
    # squared distances from the mean: 4, 16 and 4
    x = torch.tensor([[3.0, 0.0], [1.0, 4.0], [1.0, -2.0]])
    error = torch.tensor([[1.0, 0.0], [0.0, 4.0], [2.0, 2.0]])  # squared errors: 1, 16 and 8
    terms = LossTerms(*(torch.tensor(value) for value in (0.5, 0.25, 0.125, 0.75)))
    output = Output(terms, torch.tensor([1, 2]), torch.tensor(6), error)
    numbers, quantiles = batch_numbers(WHOLE, output, x, mean)
    assert numbers == {
        "fvu": 0.5,
        "loss": 0.75,
        "auxk_loss": 0.25,
        "sparsity_loss": 0.125,
        "l0_latents": 2.0,
        "shard_load_ratio": 1.0,
    }
    assert tuple(quantiles) == QUANTILES
    # per row .75, 0 and -1: the median is 0, and the quartiles are halfway
    assert quantiles["0.5"] == 0
    assert quantiles["0.25"] == pytest.approx(-0.5)
    assert quantiles["0.75"] == pytest.approx(0.375)


def test_the_fvu_of_a_site_is_of_its_own_columns_and_variance() -> None:
    """The FVU over all sites is the sum of the errors over the sum of the variances."""
    of_mean = [torch.zeros(width, dtype=torch.float64) for width in (2, 1)]
    of = {"a": Normaliser(1.0, of_mean[0], 4.0, 9), "b": Normaliser(1.0, of_mean[1], 0.5, 9)}
    error = torch.tensor([[1.0, 1.0, 3.0], [2.0, 0.0, 1.0]])  # 6 for a and 10 for b, in 2 rows
    found = site_fvus(WHOLE, error, SiteNormalisers(("a",), ("a", "b"), of))
    assert found == {"a": pytest.approx(6 / (2 * 4.0)), "b": pytest.approx(10 / (2 * 0.5))}


def test_the_fvu_of_a_prefix_is_labelled_with_its_latents() -> None:
    terms = LossTerms(*(torch.tensor(0.5) for _ in range(4)))
    prefix_fvu = (torch.tensor(0.75), torch.tensor(0.5))
    output = Output(terms, torch.ones(2), torch.tensor(6), torch.ones(3, 2), prefix_fvu=prefix_fvu)
    assert prefix_fvus(WHOLE, output, (16, 64)) == {"16": 0.75, "64": 0.5}


def test_latents_whose_gradients_are_near_eps_are_counted() -> None:
    """A latent counts if its root mean second moment is below 10 eps, here 1 latent in 4."""
    moments = torch.tensor([[4e-10, 0.0], [1e-12, 1e-10], [1.0, 0.0], [3e-10, 1e-10]])
    assert starved_share(WHOLE, moments, eps=1e-6) == 0.25


def test_loads_of_experts_are_those_since_the_last_report() -> None:
    experts, dead = ExpertLoads(), torch.arange(12) >= 7
    assert experts.take(WHOLE, dead) == {}
    for load in ([5, 0, 0, 3], [6, 0, 1, 1]):
        experts.add(Routing(torch.tensor(load), 2))
    numbers = experts.take(WHOLE, dead)
    assert numbers == {"expert_load_ratio": 11 / 4, "idle_experts": 1, "expert_dead_share": 1}
    experts.add(Routing(torch.tensor([1, 1, 1, 1]), 2))
    assert experts.take(WHOLE, dead)["expert_load_ratio"] == 1


def test_experts_without_a_row_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    experts, dead = ExpertLoads(), torch.zeros(12, dtype=torch.bool)
    for _ in range(2):
        experts.add(Routing(torch.tensor([4, 0, 2, 2]), 0))
        _, idle = expert_numbers(WHOLE, torch.tensor([4, 0, 2, 2]), dead)
        assert idle == [1]
        with caplog.at_level(logging.WARNING):
            experts.take(WHOLE, dead)
    (said,) = caplog.messages
    assert said.startswith("experts 1 got no rows since the last report; raise sae.balance")
