import itertools

import pytest
import torch
from torch import Tensor

from dist_sae.config.data import SyntheticModel
from dist_sae.models.synthetic import SyntheticSource, SyntheticTokenizer

WORLD = SyntheticModel(d_in=24, n_features=80, l0=5.0)


def acts(source: SyntheticSource, *contexts: range) -> list[Tensor]:
    """Return the activations of contexts of consecutive rows, computed as one padded batch."""
    shape = (len(contexts), max(map(len, contexts)))
    tokens, mask = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.bool)
    for i, context in enumerate(contexts):
        tokens[i, : len(context)] = torch.tensor(context)
        mask[i, : len(context)] = True
    result = source.run(tokens, mask)["synthetic"]
    return [rows[: len(context)] for rows, context in zip(result, contexts, strict=True)]


@pytest.mark.parametrize("cuts", [(), (64, 128), (1, 2, 63, 65, 150), (7, 77, 177)])
def test_a_row_is_the_same_however_rows_are_grouped(cuts: tuple[int, ...]) -> None:
    source = SyntheticSource(WORLD)
    (whole,) = acts(source, range(1000, 1200))
    edges = [0, *cuts, 200]
    contexts = [range(1000 + a, 1000 + b) for a, b in itertools.pairwise(edges)]
    pieces = acts(SyntheticSource(WORLD), *contexts[::-1])[::-1]
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(acts(source, range(1100, 1101))[0][0], whole[100])


def test_activations_are_the_intensities_times_the_directions_plus_the_bias() -> None:
    source = SyntheticSource(WORLD)
    (x,) = acts(source, range(30, 190))
    expected = source.intensities(30, 160) @ source.directions + source.bias
    torch.testing.assert_close(x, expected)
    assert source.bias.norm() > 0.1


def test_rows_differ_and_seeds_differ() -> None:
    one, other = SyntheticSource(WORLD), SyntheticSource(WORLD.model_copy(update={"seed": 1}))
    (x,) = acts(one, range(500))
    assert len(torch.unique(x, dim=0)) == 500
    assert not torch.equal(x, acts(other, range(500))[0])
    assert (one.directions @ other.directions.T).abs().max() < 0.9


def test_the_same_config_gives_the_same_world_whatever_torchs_own_seed() -> None:
    torch.manual_seed(3)
    one = SyntheticSource(WORLD)
    torch.manual_seed(4)
    other = SyntheticSource(WORLD)
    assert torch.equal(one.directions, other.directions)
    assert torch.equal(acts(one, range(9))[0], acts(other, range(9))[0])


def test_directions_are_no_trainers_random_numbers() -> None:
    """The directions are not those of a generator with the same seed.

    Otherwise a trainer with this seed would start at the true directions.
    """
    source = SyntheticSource(WORLD)
    drawn = torch.randn(80, 24, generator=torch.Generator().manual_seed(WORLD.seed))
    drawn /= drawn.norm(dim=1, keepdim=True)
    assert (drawn @ source.directions.T).abs().max() < 0.9


def test_directions_have_length_one() -> None:
    torch.testing.assert_close(SyntheticSource(WORLD).directions.norm(dim=1), torch.ones(80))


@pytest.mark.parametrize(
    ("zipf", "p_max", "l0", "n"),
    [
        (1.0, 0.5, 5.0, 80),
        (1.0, 0.1, 5.0, 80),
        (0.0, 0.5, 5.0, 80),
        (2.0, 0.5, 3.0, 80),
        (1, 1, 8, 8),
    ],
)
def test_probabilities_sum_to_l0_and_fall_as_zipf_below_the_cap(
    zipf: float, p_max: float, l0: float, n: int
) -> None:
    config = SyntheticModel(d_in=4, n_features=n, l0=l0, zipf=zipf, p_max=p_max)
    p = SyntheticSource(config).probabilities.double()
    assert float(p.sum()) == pytest.approx(l0, rel=1e-5)
    assert p.max() <= p_max + 1e-6
    rank = torch.arange(1, n + 1, dtype=torch.float64)
    free = p < p_max - 1e-6
    constant = (p * rank**zipf)[free]
    torch.testing.assert_close(constant, constant.mean().expand_as(constant), rtol=1e-5, atol=0)
    assert not free[: int((~free).sum())].any()  # the most frequent features are capped


def test_features_fire_as_often_as_they_should() -> None:
    """In 20,000 rows, each feature's rate is within 5 standard deviations, and L0 within 1 %."""
    source = SyntheticSource(WORLD)
    active = source.intensities(0, 20_000) > 0
    p = source.probabilities
    deviation = (p * (1 - p) / 20_000).sqrt()
    assert ((active.float().mean(0) - p).abs() < 5 * deviation).all()
    assert float(active.sum(1).float().mean()) == pytest.approx(5.0, rel=0.01)


def test_features_fire_independently() -> None:
    """The two most frequent features fire together at a rate of p1 p2."""
    source = SyntheticSource(WORLD)
    active = (source.intensities(0, 20_000) > 0)[:, :2].float()
    both = float(source.probabilities[:2].prod())
    assert float(active.prod(1).mean()) == pytest.approx(both, abs=5 * (both / 20_000) ** 0.5)


def test_intensities_are_about_one() -> None:
    """Intensities are 1 + .25 N(0, 1), at least .1. The mean of some 100,000 is within .005."""
    found = SyntheticSource(WORLD).intensities(0, 20_000)
    found = found[found > 0]
    assert float(found.mean()) == pytest.approx(1.0, abs=0.005)
    assert float(found.std()) == pytest.approx(0.25, abs=0.005)
    assert found.min() >= 0.1 - 1e-7


def test_tokens_are_the_numbers_of_the_rows() -> None:
    tokenizer = SyntheticTokenizer(3)
    assert tokenizer(["0", "4"]) == [[0, 1, 2], [12, 13, 14]]
    assert tokenizer.bos is None
    assert tokenizer.text([12, 13]) == ["12 ", "13 "]
