"""Output tokens against brute force in fp64."""

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import dist_sae.index.outputs
from dist_sae.config.data import HuggingFaceModel, ModelConfig, SyntheticModel
from dist_sae.dictionaries.normaliser import Normaliser, SiteNormalisers
from dist_sae.errors import ConfigError
from dist_sae.index.outputs import OutputTokens, head_digest, open_outputs
from dist_sae.models.head import Head

WIDTH, VOCABULARY, LATENTS = 12, 53, 31


def head(*, centres: bool) -> Head:
    generator = torch.Generator().manual_seed(4)
    unembedding = torch.randn(VOCABULARY, WIDTH, generator=generator) + 0.5
    gain = 1 + torch.rand(WIDTH, generator=generator)
    mean = unembedding.bfloat16().float().mean(0)
    return Head(unembedding.bfloat16(), gain, mean, "of this head", centres)


@pytest.mark.parametrize("centres", [True, False])
def test_output_tokens_are_the_extremes_of_all_effects(
    monkeypatch: pytest.MonkeyPatch, *, centres: bool
) -> None:
    monkeypatch.setattr(dist_sae.index.outputs, "LATENTS", 7)
    monkeypatch.setattr(dist_sae.index.outputs, "VOCABULARY", 9)
    rows = torch.randn(LATENTS, WIDTH, generator=torch.Generator().manual_seed(1)) + 1
    of = head(centres=centres)
    top, bottom = OutputTokens(of, 10).of(rows).values()
    exact = rows.double().numpy()
    if centres:
        exact -= exact.mean(1, keepdims=True)
    effects = (exact * of.gain.double().numpy()) @ of.unembedding.double().numpy().T
    effects -= effects.mean(1, keepdims=True)
    order = np.argsort(-effects, axis=1)
    assert top.tokens.tolist() == order[:, :10].tolist()
    assert bottom.tokens.tolist() == order[:, ::-1][:, :10].tolist()
    for end in (top, bottom):
        wanted = np.take_along_axis(effects, end.tokens.numpy(), 1)
        np.testing.assert_allclose(end.effects.numpy(), wanted, atol=1e-4)


def test_a_vocabulary_smaller_than_what_is_asked_for() -> None:
    of = head(centres=False)
    few = of._replace(unembedding=of.unembedding[:4], mean=of.unembedding[:4].float().mean(0))
    top, bottom = OutputTokens(few, 10).of(torch.ones(2, WIDTH)).values()
    assert sorted(top.tokens[0].tolist()) == [0, 1, 2, 3]
    assert top.tokens[0].tolist() == bottom.tokens[0].tolist()[::-1]


def normalisers(*sites: str, width: int = WIDTH) -> SiteNormalisers:
    """Return normalizers with scales 1, 2, 3, ..."""
    mean = torch.zeros(width, dtype=torch.float64)
    of = {site: Normaliser(1.0 + i, mean, 1.0, 1) for i, site in enumerate(sites)}
    return SiteNormalisers(sites, sites, of)


def opened(
    model: ModelConfig, width: int, n: int = 10, begun: str | None = None
) -> dict[str, list[list[int]]]:
    """Return a worker's output tokens.

    The worker begins an index, or joins one that was begun with the head `begun`.
    """
    known = normalisers("resid_post.1", width=width)
    manifest: Any = SimpleNamespace(name="i", settings={"output_tokens": n}, head=begun)
    if begun is None:
        manifest.head = head_digest(model, manifest, known)
    found = open_outputs(model, manifest, known).of(torch.ones(2, width))
    return {end: found[end].tokens.tolist() for end in found}


@pytest.mark.parametrize(
    ("sites", "factors"),
    [
        # rows that are added to the stream are summed
        (("mlp_out.0", "attn_out.1", "attn_z.1"), (1, 1 / 2, 0)),
        # the last residual stream includes all others
        (("resid_post.0", "mlp_out.1", "resid_pre.2"), (0, 0, 1)),
        # resid_pre.1 and resid_post.0 are the same place
        (("resid_pre.1", "resid_post.0", "attn_z.0"), (1, 0, 0)),
    ],
)
def test_of_several_sites_it_is_what_they_add_to_the_residual_stream(
    monkeypatch: pytest.MonkeyPatch, sites: tuple[str, ...], factors: tuple[float, ...]
) -> None:
    """With several sites, output tokens come from the sum that they add to the residual stream.

    The sum is in the scale of the first site that counts.
    """
    of = head(centres=True)
    monkeypatch.setattr("dist_sae.models.head.load_head", lambda *_: of)
    rows = torch.randn(LATENTS, 3, WIDTH, generator=torch.Generator().manual_seed(1))
    manifest: Any = SimpleNamespace(settings={"output_tokens": 10}, head=None)
    outputs = open_outputs(HuggingFaceModel(path="m"), manifest, normalisers(*sites))
    found = outputs.of(rows.flatten(1))
    expected = OutputTokens(of, 10).of((rows * torch.tensor(factors)[:, None]).sum(1))
    for end in ("top", "bottom"):
        assert torch.equal(found[end].tokens, expected[end].tokens)
        torch.testing.assert_close(found[end].effects, expected[end].effects)


NONE: dict[str, list[list[int]]] = {"top": [[], []], "bottom": [[], []]}


def test_what_is_left_out_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert opened(SyntheticModel(), 16) == NONE
        assert opened(HuggingFaceModel(path="/nowhere/model"), 16, n=0) == NONE
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert opened(HuggingFaceModel(path="/nowhere/model"), 16) == NONE
        (record,) = caplog.records
        why = "output tokens of latents are left out: model.path /nowhere"
        assert record.getMessage().startswith(why)
        monkeypatch.setattr("dist_sae.models.head.load_head", lambda *_: head(centres=False))
        assert opened(HuggingFaceModel(path="m"), 3 * WIDTH) == NONE
        assert "decoder rows are 36 wide, but the head of m is 12 wide" in caplog.text
    assert len(opened(HuggingFaceModel(path="m"), WIDTH)["top"][0]) == 10


def test_a_worker_makes_the_output_tokens_that_the_index_was_begun_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker that joins an index uses the same head as the index, or fails with a one-line error.

    If the index has no output tokens, the worker computes none.
    """
    gone, there = HuggingFaceModel(path="/nowhere/model"), HuggingFaceModel(path="m")
    wrong = "index i: was created with a different output head than this worker's model: "
    with pytest.raises(ConfigError, match=f"^{wrong}model.path /nowhere.*index.name") as caught:
        opened(gone, WIDTH, begun="of this head")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("dist_sae.models.head.load_head", lambda *_: head(centres=False))
    assert len(opened(there, WIDTH, begun="of this head")["top"][0]) == 10
    with pytest.raises(ConfigError, match=f"^{wrong}the weights differ"):
        opened(there, WIDTH, begun="of that head")
    assert opened(there, WIDTH, begun="") == NONE
