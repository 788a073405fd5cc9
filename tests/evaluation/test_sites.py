"""Dictionaries of several sites, spliced into a tiny language model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from dist_sae.config import Run, load_run
from dist_sae.config.data import HuggingFaceModel
from dist_sae.data.plan import load_plan
from dist_sae.dictionaries.interface import Inferred
from dist_sae.dictionaries.metrics import Fit
from dist_sae.dictionaries.normaliser import Normaliser, SiteNormalisers
from dist_sae.evaluation.cross_entropy import cross_entropies
from dist_sae.evaluation.splice import Splice
from dist_sae.producing.planner import plan
from dist_sae.storage import open_store
from tests.models.test_huggingface import D, save_model
from tests.producing.test_produce_together import run_file
from tests.world import open_activation_set

hf: Any = transformers
STREAMS = ("resid_post.0", "attn_out.1", "resid_post.2")
INPUTS, OUTPUTS = ("mlp_in.0", "mlp_in.2"), ("mlp_out.0", "mlp_out.2")
SCALES = dict(zip((*STREAMS, *INPUTS, *OUTPUTS), (0.5, 2.0, 3.0, 4.0, 0.25, 1.5, 2.5), strict=True))


class Stub:
    """A dictionary that applies a given function to the scaled rows."""

    def __init__(self, x_hat: Callable[[Tensor], Tensor]) -> None:
        self._x_hat = x_hat

    def infer(self, x: Tensor) -> Inferred:
        return Inferred(self._x_hat(x), torch.zeros(1, dtype=torch.int32))


def normalisers_of(reads: tuple[str, ...], writes: tuple[str, ...]) -> SiteNormalisers:
    """Return normalizers whose scales and means differ between sites."""
    of = {
        site: Normaliser(SCALES[site], torch.full((D,), 0.1 * SCALES[site]).double(), 1.0, 1)
        for site in (*reads, *writes)
    }
    return SiteNormalisers(reads, writes, of)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A planned run with contexts of 16 tokens whose rows are all replaced."""
    folder = tmp_path_factory.mktemp("run")
    made = load_run(
        run_file(folder, save_model(folder / "model", "llama")),
        [
            "activations.context_tokens=16",
            "activations.prepend_bos=false",
            "activations.exclude={special_tokens: false, first_positions: 0, over_norm: null}",
            "evaluate.contexts=5",
        ],
    )
    plan(made)
    return made


def measured(
    run: Run,
    reads: tuple[str, ...],
    writes: tuple[str, ...],
    x_hat: Callable[[Tensor], Tensor],
    **options: Any,
) -> dict[str, Any]:
    normalisers = normalisers_of(reads, writes)
    return cross_entropies(open_activation_set(run), run, Stub(x_hat), normalisers, **options)


def test_the_identity_recovers_all_at_several_sites_and_zeros_recover_nothing(run: Run) -> None:
    identity, zeros = (
        measured(run, STREAMS, STREAMS, x_hat) for x_hat in (lambda x: x, torch.zeros_like)
    )
    assert identity["ce_spliced"] == pytest.approx(identity["ce_clean"], abs=1e-6)
    assert list(identity["ce_by_site"]) == list(STREAMS)
    for place in (identity, *identity["ce_by_site"].values()):
        assert place["ce_recovered"] == pytest.approx(1, abs=1e-5)
        assert place["ce_recovered_mean"] == pytest.approx(1, abs=1e-5)
    for place in (zeros, *zeros["ce_by_site"].values()):
        assert place["ce_spliced"] == place["ce_zero"] != place["ce_mean"]
        assert place["ce_recovered"] == 0
    alone = [each["ce_zero"] for each in zeros["ce_by_site"].values()]
    # residual streams of zeros stay zero through all later layers
    assert alone[0] == alone[2] == zeros["ce_zero"] != alone[1]
    assert "ce_replacement" not in identity
    assert "ce_recovered" in identity["intervals"]


def test_means_recover_nothing_against_the_mean(run: Run) -> None:
    def means(x: Tensor) -> Tensor:
        scales = torch.tensor([SCALES[site] for site in STREAMS])
        return (0.1 * scales).repeat_interleave(D).expand_as(x)

    found = measured(run, STREAMS, STREAMS, means)
    assert found["ce_recovered_mean"] == pytest.approx(0, abs=1e-5)
    for site in STREAMS:
        assert found["ce_by_site"][site]["ce_recovered_mean"] == pytest.approx(0, abs=1e-5)


def causal_map() -> Tensor:
    """Return a map from two MLPs' scaled inputs to outputs; the first ignores input two."""
    generator = torch.Generator().manual_seed(2)
    weights: Tensor = torch.randn(2 * D, 2 * D, generator=generator) / D**0.5
    weights[D:, :D] = 0
    return weights


def by_hand(run: Run, *, live: bool) -> tuple[float, float]:
    """Return nats per token with the plain MLPs and with the MLPs replaced by the map."""
    assert isinstance(run.model, HuggingFaceModel)
    model = hf.AutoModelForCausalLM.from_pretrained(run.model.path).eval()
    weights = causal_map()
    contexts = heldout_contexts(run)
    mlps = [model.model.layers[layer].mlp for layer in (0, 2)]
    plain = [mlp.forward for mlp in mlps]
    read: list[Tensor] = [torch.zeros(0), torch.zeros(0)]

    def reading(i: int) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            read[i] = x
            acts: Tensor = plain[i](x)
            return acts

        return forward

    def replaced(i: int) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if live:
                read[i] = x
            rows = torch.cat([SCALES[s] * acts for s, acts in zip(INPUTS, read, strict=True)], -1)
            if live and i == 0:
                rows = torch.cat([SCALES[INPUTS[0]] * x, torch.zeros_like(x)], -1)
            return (rows @ weights)[..., i * D : (i + 1) * D] / SCALES[OUTPUTS[i]]

        return forward

    sums, tokens = [0.0, 0.0], 0
    for ids in contexts:
        given = torch.tensor([ids])
        for n, forwards in enumerate((reading, replaced)):
            for i, mlp in enumerate(mlps):
                mlp.forward = forwards(i)
            with torch.no_grad():
                logits = model(given).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, given[0, 1:], reduction="sum")
            sums[n] += float(loss)
        tokens += len(ids) - 1
    return sums[0] / tokens, sums[1] / tokens


def heldout_contexts(run: Run) -> list[list[int]]:
    """Return the first five contexts of held-out documents."""
    made = load_plan(open_store(run.store.activations), run)
    texts = Path(run.corpus.files[0]).read_text().splitlines()  # type: ignore[union-attr]
    contexts: list[list[int]] = []
    for unit in made.heldout_units:
        for span in made.units[unit]:
            for line in texts[span.first : span.first + span.count]:
                ids = [int(word[1:]) for word in line[10:-2].split()]
                contexts += [ids[start : start + 16] for start in range(0, len(ids), 16)]
    return contexts[:5]


def test_the_replacement_model_reads_what_it_wrote_and_the_spliced_one_does_not(run: Run) -> None:
    """Spliced and replacement losses match transformers with the two MLPs replaced by hand."""
    weights = causal_map()
    found = measured(run, INPUTS, OUTPUTS, lambda x: x @ weights, causal=True)
    clean, spliced = by_hand(run, live=False)
    _, replacement = by_hand(run, live=True)
    assert found["ce_clean"] == pytest.approx(clean, rel=1e-5)
    assert found["ce_spliced"] == pytest.approx(spliced, rel=1e-5)
    assert found["ce_replacement"] == pytest.approx(replacement, rel=1e-5)
    assert abs(spliced - replacement) > 1e-3
    assert {"ce_recovered_replacement", "ce_recovered_mean_replacement"} <= found.keys()


def test_of_one_layer_the_replacement_model_is_the_spliced_one(run: Run) -> None:
    weights = causal_map()[:D, :D]
    found = measured(run, INPUTS[:1], OUTPUTS[:1], lambda x: x @ weights, causal=True)
    assert found["ce_replacement"] == found["ce_spliced"] != found["ce_clean"]
    assert "ce_by_site" not in found


def test_a_row_that_is_unusual_at_one_site_is_left_alone_at_all() -> None:
    """A row with an unusual norm at one site is not replaced at any site.

    Row 1 is long at the first site and row 2 at the second. Row 3 is excluded.
    """
    keep = torch.tensor([[True, True, True, False, True]])
    acts = {site: torch.ones(1, 5, D) for site in OUTPUTS}
    acts["mlp_out.0"][0, 1] *= 100
    acts["mlp_out.2"][0, 2] *= 100
    splice = Splice(keep, 10.0, Stub(lambda x: 3 * x), normalisers_of(OUTPUTS, OUTPUTS))
    for site, edit in splice.read().items():
        assert torch.equal(edit(acts[site]), acts[site])
    for site, edit in splice.reconstruct(OUTPUTS).items():
        expected = acts[site].clone()
        expected[0, [0, 4]] = 3
        torch.testing.assert_close(edit(acts[site]), expected)


def test_fvu_by_site_is_of_its_columns() -> None:
    """FVU by site matches values worked out by hand.

    Relative to the mean (1, 0, 0) the rows are (0, 3, 4) and (2, 0, 0).
    """
    targets = torch.tensor([[1.0, 3.0, 4.0], [3.0, 0.0, 0.0]])
    x_hat = torch.tensor([[1.0, 3.0, 3.0], [2.0, 0.0, 2.0]])
    fit = Fit.empty(1, (slice(0, 1), slice(1, 3)))
    for row in range(2):
        found = Inferred(x_hat[row : row + 1], torch.tensor([1], dtype=torch.int32))
        fit = fit.add(targets[row : row + 1], found, torch.tensor([1.0, 0.0, 0.0]))
    assert fit.fvu_by_site == [1 / 4, 5 / 25]
    assert fit.fvu == pytest.approx(6 / 29)
