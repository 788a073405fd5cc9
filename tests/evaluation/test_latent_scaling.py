"""Latent scaling finds shared features whose latents look exclusive to one model."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dist_sae.checkpoint import pages
from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.checkpoint.pages import PagedDictionary
from dist_sae.config.crosscoder import CrosscoderConfig
from dist_sae.config.sae import CrosscoderReLUConfig, SaeConfig
from dist_sae.dictionaries import build_sae
from dist_sae.dictionaries.axis import LatentAxis
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.interface import Widths
from dist_sae.evaluation.latent_scaling import LatentScaling, is_applicable
from dist_sae.storage import open_store
from tests.world import save

WIDTH, BOTH, ALONE, ROWS = 48, 30, 9, 3000
SHRUNK, SPLIT = range(20), range(20, 24)
"""Shared features whose latent has a zero decoder for one model, or that have two latents."""
LATENTS = BOTH + 2 * ALONE + len(SPLIT)
SITES = ("resid_post.7", "resid_post.7@other")
CONFIGS: dict[str, SaeConfig] = {
    "relu": CrosscoderReLUConfig(n_latents=LATENTS, reads=SITES),
    "row": CrosscoderConfig(n_latents=LATENTS, k=16, auxk=0, selection="row", reads=SITES),
}


class Planted(NamedTuple):
    sae: Dictionary
    x: Tensor
    of_one: Tensor
    """Latents that write only one site."""
    shared: Tensor
    """Latents whose feature both models have."""


def planted(config: SaeConfig) -> Planted:
    """Return a dictionary of the true features, except for decoder rows set to zero by hand.

    The directions of a shared feature in the two models differ by up to 60 degrees.
    """
    generator = torch.Generator().manual_seed(0)
    n = BOTH + 2 * ALONE
    one, other = (
        torch.nn.functional.normalize(torch.randn(n, WIDTH, generator=generator), dim=1)
        for _ in range(2)
    )
    other = torch.nn.functional.normalize(other - (one * other).sum(1, keepdim=True) * one, dim=1)
    angles = torch.linspace(0, torch.pi / 3, BOTH)[torch.randperm(BOTH, generator=generator)]
    angles[SPLIT.start : SPLIT.stop] /= 2
    angles = torch.cat([angles, torch.zeros(2 * ALONE)])[:, None]
    truth = torch.stack([one, angles.cos() * one + angles.sin() * other], 1)
    truth[BOTH : BOTH + ALONE, 1] = truth[BOTH + ALONE :, 0] = 0
    codes = torch.rand(ROWS, n, generator=generator) < 4 / n
    acts = codes * (1 + 0.25 * torch.randn(ROWS, n, generator=generator)).clamp_min(0.1)
    x = acts @ truth.flatten(1) + 0.02 * torch.randn(ROWS, 2 * WIDTH, generator=generator)

    rows, inverse = truth.clone(), torch.linalg.pinv(truth.flatten(1)).T
    for feature in (*SHRUNK, *SPLIT):
        rows[feature, feature % 2] = 0
    halves = truth[SPLIT.start : SPLIT.stop].clone()
    for place, feature in enumerate(SPLIT):
        halves[place, 1 - feature % 2] = 0
    sae = build_sae(config, Widths((WIDTH, WIDTH), (WIDTH, WIDTH)))
    decoder = torch.cat([rows, halves]).flatten(1)
    lengths = decoder.norm(dim=1, keepdim=True)  # a crosscoder's decoder rows have norm 1
    with torch.no_grad():
        sae.W_dec.copy_(decoder / lengths)
        sae.W_enc.copy_(lengths * torch.cat([inverse, inverse[SPLIT.start : SPLIT.stop]]))
        sae.b_enc.fill_(-0.02)
    numbers = torch.arange(LATENTS)
    shared = (numbers < BOTH) | (numbers >= n)
    return Planted(sae, x, ~shared | (numbers < SPLIT.stop) | (numbers >= n), shared)


def measured(dictionary: PagedDictionary, x: Tensor) -> LatentScaling:
    scaling = LatentScaling(LATENTS)
    for some in torch.split(x, 1500):
        scaling.add(some, dictionary.infer(some).x_hat, dictionary.encode_pages(some))
    return scaling


@pytest.mark.parametrize("kind", CONFIGS)
def test_shrunk_and_split_features_are_flagged_and_exclusive_ones_are_not(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latent scaling matches dense sums in fp64, both in memory and in pages of a few latents.

    About 12 of a row's 16 codes are noise, and rounding decides some of these.
    """
    monkeypatch.setattr(pages, "SLICE_ROWS", 1024)
    config = CONFIGS[kind]
    sae, x, of_one, shared = planted(config)
    checkpoints = Checkpoints(open_store(str(tmp_path)), "run", 1)
    save(checkpoints, 1, dict(sae.tensors()), {})
    checkpoint = checkpoints.open(1)
    n_bytes = sum(tensor.nbytes for _, tensor in sae.tensors())
    nu = measured(PagedDictionary(config, sae.widths, checkpoint), x).nu()
    some = PagedDictionary(config, sae.widths, checkpoint, n_bytes)
    assert len(list(some.parts("b_enc"))) > 3
    scaling = measured(some, x)
    torch.testing.assert_close(scaling.nu(), nu, rtol=0, atol=2e-4, equal_nan=True)
    expected = dense_nu(sae, x, of_one)
    torch.testing.assert_close(nu, expected, rtol=0, atol=1e-4, equal_nan=True)

    fires = torch.ones(LATENTS, dtype=torch.bool)
    found = scaling.result(SITES, fires)
    n_flagged = sum(at["flagged_share"] for at in found["latents_by_site"].values()) * LATENTS
    n_exclusive = sum(at["exclusive_share"] for at in found["latents_by_site"].values()) * LATENTS
    wrong = int((of_one & shared).sum())
    assert wrong == len(SHRUNK) + 2 * len(SPLIT)
    assert round(n_exclusive) == int(of_one.sum()) == wrong + 2 * ALONE
    assert found["shared_share"] == pytest.approx(1 - n_exclusive / LATENTS)
    right = (nu >= torch.tensor([0.2, 0.5])).any(1)
    assert int((right & of_one & shared).sum()) >= 0.9 * wrong
    assert not (right & ~shared).any()
    assert round(n_flagged) == int((right & of_one).sum())
    alone = fires.clone()
    # as if the second model's own latents never fired
    alone[BOTH + ALONE : BOTH + 2 * ALONE] = False
    by_site = scaling.result(SITES, alone)["latents_by_site"]
    n = LATENTS - ALONE
    lost = found["latents_by_site"][SITES[1]]["exclusive_share"] * LATENTS - ALONE
    assert by_site[SITES[1]]["exclusive_share"] * n == pytest.approx(lost)


class SumOfTwo(LatentAxis):
    """Axis that adds the first rank's tensors to the second's, which runs afterwards."""

    def __init__(self) -> None:
        self.first: list[Tensor] = []
        self.second = False

    def total(self, tensor: Tensor) -> Tensor:
        if self.second:
            return tensor + self.first.pop(0)
        self.first.append(tensor)
        return tensor


def test_ranks_add_their_latents_up() -> None:
    whole, x, _, _ = planted(CONFIGS["relu"])
    x_hat, fires = whole.infer(x).x_hat, torch.ones(LATENTS, dtype=torch.bool)
    alone = LatentScaling(LATENTS)
    alone.add(x, x_hat, [(whole, slice(None), whole.encode(x))])
    both, found = SumOfTwo(), alone.result(SITES, fires)
    for shard in (0, 1):
        place = LatentAxis(shard=shard, shards=2)
        part = build_sae(CONFIGS["relu"], whole.widths, place)
        for name, tensor in part.tensors():
            given = dict(whole.tensors())[name].detach()
            tensor.data.copy_(given.chunk(2)[shard] if part.is_per_latent(name) else given)
        scaling = LatentScaling(LATENTS)
        scaling.add(x, x_hat, [(part, slice(None), part.encode(x))])
        both.second = shard == 1
        together = scaling.result(SITES, fires, both)
    assert together == found
    assert min(at["flagged_share"] for at in found["latents_by_site"].values()) > 0.2


def dense_nu(sae: Dictionary, x: Tensor, of_one: Tensor) -> Tensor:
    """Return the scaling by its definition, one latent at a time from dense codes."""
    codes, acts = sae.encode(x), torch.zeros(len(x), LATENTS, dtype=torch.float64)
    ends = torch.cat([codes.starts[1:], torch.tensor([len(codes.acts)])])
    places = torch.arange(len(x)).repeat_interleave(ends - codes.starts)
    acts[places, codes.latents] = codes.acts.double()
    rows = sae.W_dec.detach().double().view(-1, 2, WIDTH)
    x_hat = torch.einsum("bn,nsd->bsd", acts, rows)
    error = x.double().view(-1, 2, WIDTH) - x_hat
    nu = torch.full((LATENTS, 2), torch.nan, dtype=torch.float64)
    for latent in of_one.nonzero()[:, 0].tolist():
        own = int(rows[latent].norm(dim=1).argmax())
        part = acts[:, latent, None] * rows[latent, own]
        for number in (0, 1):
            betas = []
            for site in (own, 1 - own):
                back = acts[:, latent, None] * rows[latent, site]
                y = x_hat[:, site] if number else error[:, site] + back
                betas.append(float((part * y).sum() / part.square().sum()))
            nu[latent, number] = betas[1] / betas[0]
    return nu


def test_it_is_of_crosscoders_of_two_sites_of_one_width() -> None:
    config = CONFIGS["row"]
    assert is_applicable(config, Widths((4, 4), (4, 4)))
    assert not is_applicable(config, Widths((4, 4, 4), (4, 4, 4)))
    assert not is_applicable(config, Widths((4, 6), (4, 6)))
    assert not is_applicable(config, Widths((4,), (4,)))
