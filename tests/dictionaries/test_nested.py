"""Nested reconstructions: Matryoshka prefixes and Multi-TopK."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dist_sae.config.matryoshka import MatryoshkaConfig
from dist_sae.config.sae import TopKConfig
from dist_sae.dictionaries.axis import LatentAxis
from dist_sae.kernels import Entries
from dist_sae.kernels.torch import KERNELS
from tests.dictionaries.recipes import (
    BATCH,
    CONFIGS,
    N_LATENTS,
    VARIANCE,
    VARIANTS,
    K,
    gradients,
    make,
    relative_error,
    rows,
    sae_rows,
    some_dead,
    step,
)


def test_prefixes_repeat_with_the_least_period() -> None:
    config = MatryoshkaConfig(n_latents=16, k=2, prefixes=(0.125, 0.5))
    assert config.prefix_widths == (2, 8, 16)
    assert [config.prefix_of(latent) for latent in range(16)] == [0, 1, 1, 1, 2, 2, 2, 2] * 2


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({"n_latents": 4096}, 128),
        ({"n_latents": 96, "prefixes": (32, 64)}, 32),
        ({"n_latents": 60, "prefixes": (0.2, 0.4, 1)}, 12),
        ({"n_latents": 64, "prefixes": (7,)}, 1),
    ],
)
def test_every_shard_has_the_same_part_of_every_prefix(settings: dict[str, Any], most: int) -> None:
    """Shards get equal parts of every prefix exactly if their number divides the prefix widths."""
    config = MatryoshkaConfig(k=2, auxk=0, **settings)
    numbers = [config.prefix_of(latent) for latent in range(config.n_latents)]
    for prefix, width in enumerate(config.prefix_widths):
        assert sum(number <= prefix for number in numbers) == width
    fitting = [n for n in range(1, config.n_latents + 1) if config.shards_problem(n) is None]
    assert fitting == [n for n in range(1, most + 1) if most % n == 0]
    for shards in fitting:
        parts = [
            [numbers[latent] for latent in LatentAxis(shard, shards).latents(config.n_latents)]
            for shard in range(shards)
        ]
        assert {tuple(sorted(part)) for part in parts} == {tuple(sorted(parts[0]))}


def test_one_prefix_is_batchtopk_bitwise() -> None:
    batchtopk = CONFIGS["batchtopk"].model_dump(exclude={"kind"})
    found = []
    for config in (CONFIGS["batchtopk"], MatryoshkaConfig(**batchtopk, prefixes=(1,))):
        sae = make(config)
        terms = sae.objective(sae_rows(rows()), step(some_dead())).terms
        found.append([*terms, *gradients(sae, terms.total).values(), sae.get_buffer("threshold")])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_the_fvu_of_a_prefix_is_that_of_its_latents_alone() -> None:
    config = CONFIGS["matryoshka"]
    assert isinstance(config, MatryoshkaConfig)
    sae, x = make(config), rows()
    output = sae.objective(sae_rows(x), step())
    sae.eval()
    numbers = torch.tensor([config.prefix_of(latent) for latent in range(N_LATENTS)])
    codes = sae.groups(sae.products(sae.encoder_inputs(x), torch.float64), K)  # type: ignore[operator]
    acts = torch.zeros(BATCH, N_LATENTS, dtype=torch.float64)
    for values, entries in codes:
        acts[entries.rows, entries.latents] = values
    for prefix, fvu in enumerate(output.prefix_fvu):
        x_hat = (acts * (numbers <= prefix)) @ sae.W_dec + sae.b_dec
        expected = (x - x_hat).square().sum() / (BATCH * VARIANCE)
        assert relative_error(fvu, expected) <= 1e-12
    assert output.prefix_fvu[-1] == output.terms.fvu
    torch.testing.assert_close(output.error, x - x_hat.detach())


@pytest.mark.parametrize(("kind", "kept"), [("matryoshka", K), ("multi-topk", 3 * K)])
def test_every_entry_is_decoded_once(kind: str, kept: int) -> None:
    """An active latent is decoded once, however many reconstructions include it."""
    sae, decoded = make(VARIANTS[kind]), []

    def combine(coefficients: Tensor, entries: Entries, W: Tensor) -> Tensor:
        decoded.append(len(entries.latents))
        return KERNELS.combine(coefficients, entries, W)

    sae.kernels = KERNELS._replace(combine=combine)
    sae.objective(sae_rows(rows()), step())
    assert decoded == [kept * BATCH]


def test_multi_topk_teaches_the_latents_beyond_k() -> None:
    """Latents between k and 3k get a gradient in Multi-TopK, but do not count as fired.

    They do not contribute to x_hat. In plain TopK they get no gradient.
    """
    x, found = rows(batch=1), {}
    for kind in ("topk", "multi-topk"):
        sae = make(VARIANTS[kind])
        output = sae.objective(sae_rows(x), step())
        assert int(output.active) == int(output.fired.sum()) == K
        found[kind] = output.error, gradients(sae, output.terms.total)
        order = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)[0].argsort(descending=True)
    torch.testing.assert_close(found["topk"][0], found["multi-topk"][0])
    for name in ("W_enc", "b_enc", "W_dec"):
        norms = [found[kind][1][name].view(N_LATENTS, -1).norm(dim=1)[order] for kind in found]
        assert not norms[0][K:].any()
        assert norms[1][: 3 * K].all()
        assert not norms[1][3 * K :].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefixes": (0.3,)}, r"prefixes: 0.3 of n_latents \(64\) is 19.2 latents; give shares"),
        ({"prefixes": (16.5,)}, r"prefixes: 16.5 of n_latents \(64\) is 16.5 latents; give shares"),
        (
            {"prefixes": (32, 16)},
            r"prefixes: 32, 16, 64 latents do not increase up to n_latents \(64\)",
        ),
        (
            {"prefixes": (16, 80)},
            r"prefixes: 16, 80, 64 latents do not increase up to n_latents \(64\)",
        ),
        ({"prefixes": ()}, "prefixes"),
        ({"prefixes": (0,)}, "prefixes"),
        (
            {"prefixes": (16,), "prefix_weights": (1,)},
            "prefix_weights: 1 given for 2 prefixes, including the whole dictionary",
        ),
    ],
)
def test_prefixes_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MatryoshkaConfig(n_latents=64, k=2, auxk=0, **settings)


def test_prefixes_that_do_not_fit_the_shards_are_refused() -> None:
    config = MatryoshkaConfig(n_latents=64, k=2, auxk=0, prefixes=(6, 16))
    assert config.shards_problem(2) is None
    problem = "6 latents are not a multiple of processes.latent_shards (4): each shard needs "
    assert config.shards_problem(4) == ("prefixes", problem + "an equal part of every prefix")


def test_latents_keep_their_prefix_when_a_dictionary_is_widened() -> None:
    narrow = MatryoshkaConfig(n_latents=64, k=2, auxk=0, prefixes=(0.25, 0.5)).model_dump()
    wide = MatryoshkaConfig(n_latents=96, k=2, auxk=0, prefixes=(24, 48))
    assert wide.parent_problem(narrow) is None
    other = MatryoshkaConfig(n_latents=96, k=2, auxk=0, prefixes=(16, 32))
    assert other.parent_problem(narrow) == (
        "prefixes: must be the same shares of n_latents, or latents would change their prefix"
    )


def test_more_latents_of_a_row_than_there_are_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"multi_factor \(4\) times k \(20\) must not exceed"):
        TopKConfig(n_latents=64, k=8, k_start=20, auxk=0, multi_factor=4)
