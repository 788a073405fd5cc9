"""A dictionary of two layers after training: its evaluation, index, page, report and notebook."""

from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from dist_sae import DistSaeError
from dist_sae.config import Run
from dist_sae.dictionaries import build_sae
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.interface import Widths
from dist_sae.evaluation.evaluate import evaluate
from dist_sae.index.query import Index
from dist_sae.models.sites import attach
from dist_sae.notebook.run import OpenedRun
from dist_sae.report.build import report
from dist_sae.report.profile import Profiles, render_profiles
from dist_sae.report.terminal import Explorer, Style
from dist_sae.storage import open_store
from tests.index.indexed import make_index, tables
from tests.notebook.raw import (
    SCALES,
    language_run,
    raw_rows,
    save_dictionary,
    save_language_model,
)

SITES = ("attn_out.0", "resid_post.1")
WIDTH, N_LATENTS = 24, 64


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Dictionary]:
    """A random cross-layer transcoder. Even latents write both layers, odd ones only the second."""
    folder = tmp_path_factory.mktemp("layers")
    sae = {"kind": "clt", "n_latents": N_LATENTS, "k": 4, "auxk": 0, "reads": list(SITES)}
    run = language_run(folder, save_language_model(folder / "model"), sae)
    dictionary = build_sae(run.sae, Widths((WIDTH, WIDTH), (WIDTH, WIDTH)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in (dictionary.W_enc, dictionary.W_dec):
            weight.copy_(torch.randn(weight.shape, generator=generator) / WIDTH**0.5)
        dictionary.b_enc[5] = -1e3
        dictionary.get_buffer("threshold").copy_(torch.tensor([0.5, 1.0]))
    save_dictionary(run, dictionary, 3)
    make_index(run)
    return run, dictionary


def scaled(acts: dict[str, Tensor]) -> Tensor:
    return torch.cat([SCALES[site] * acts[site] for site in SITES], 1)


def heldout(run: Run) -> dict[str, Tensor]:
    opened = OpenedRun(run)
    return {
        site: torch.cat([batch.acts for batch in opened.rows(heldout=True, site=site)])
        for site in SITES
    }


@pytest.mark.system
def test_evaluation_has_each_site(world: tuple[Run, Dictionary]) -> None:
    """The FVU is over all held-out rows at once, in fp64, about the checkpoint's mean."""
    run, dictionary = world
    found = evaluate(run)
    acts = heldout(run)
    x = scaled(acts)
    x_hat = dictionary.infer(x).x_hat.double()
    errors, totals = (
        [float(p.square().sum()) for p in torch.split(x.double() - other, WIDTH, 1)]
        for other in (x_hat, torch.tensor(0.125, dtype=torch.float64))
    )
    assert found["rows"] == len(x)
    assert found["site"] == "attn_out.0, resid_post.1"
    assert found["fvu"] == pytest.approx(sum(errors) / sum(totals), rel=1e-5)
    expected = {site: e / t for site, e, t in zip(SITES, errors, totals, strict=True)}
    assert found["fvu_by_site"] == pytest.approx(expected, rel=1e-5)
    assert list(found["ce_by_site"]) == list(SITES)
    assert found["pca_fvu"] < 1
    assert {"ce_replacement", "ce_recovered_replacement"} <= found.keys()
    assert "duplicate_share" not in found  # a row of W_dec is not one latent's row


def test_the_index_has_the_norms_at_each_site(world: tuple[Run, Dictionary]) -> None:
    run, dictionary = world
    summary = make_index(run)  # the index is already complete
    norms = np.stack(tables(summary["index"], "latents")["norms"].to_numpy())
    rows = dictionary.decoder_rows().detach().view(N_LATENTS, 2, WIDTH)
    expected = rows.norm(dim=2).numpy()
    np.testing.assert_allclose(norms, expected, rtol=1e-6)
    index = Index(open_store(run.store.runs), run.name)
    page = index.latent(2)
    assert page.norms == pytest.approx(dict(zip(SITES, expected[2].tolist(), strict=True)))
    assert sum(page.profile.values()) == pytest.approx(1)
    assert index.latent(1).profile == {"attn_out.0": 0, "resid_post.1": 1}
    assert page.decoder_norm == pytest.approx(float(rows[2].norm()))
    assert page.top_tokens  # from the part of the decoder row in the last residual stream
    assert not page.nearest
    assert "nearest latents (" in summary["left_out"]
    acts = [batch.acts for batch in OpenedRun(run).rows(range(len(index.manifest.units)))]
    x = torch.cat(acts) * torch.tensor([SCALES[s] for s in SITES]).repeat_interleave(WIDTH)
    error = (x - dictionary.infer(x).x_hat).double().square().sum()
    total = (x.double() - 0.125).square().sum()
    assert summary["fvu"] == pytest.approx(float(error / total), rel=1e-5)
    assert summary["never_fired"] >= 1


def test_report_and_terminal_show_the_profile(world: tuple[Run, Dictionary]) -> None:
    run, _ = world
    evaluate(run)
    page = Path(report(run)).read_text()
    assert "Decoder norms" in page
    assert "share of resid_post.1 in the sum over both sites" in page
    assert page.count("<th>FVU</th>") == 1
    assert "spans" in page
    lines = Explorer(run, None, Style()).latents([2]).lines
    (writes,) = [line for line in lines if line.startswith("  writes")]
    profile = Index(open_store(run.store.runs), run.name).latent(2).profile
    for site in SITES:
        assert f"{site} {100 * profile[site]:.0f} %" in writes


def test_a_crosscoder_of_two_sites_shows_whose_its_latents_are(
    world: tuple[Run, Dictionary],
) -> None:
    """Latents of the first half write one site each, in turn.

    The others write both sites. Latent 0 never fires.
    """
    sae = {"kind": "crosscoder_relu", "n_latents": N_LATENTS, "reads": list(SITES)}
    run = Run.model_validate(world[0].model_dump(mode="json") | {"name": "whose", "sae": sae})
    crosscoder = build_sae(run.sae, Widths((WIDTH, WIDTH), (WIDTH, WIDTH)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in (crosscoder.W_enc, crosscoder.W_dec):
            weight.copy_(torch.randn(weight.shape, generator=generator) / WIDTH**0.5)
        crosscoder.W_dec[0 : N_LATENTS // 2 : 2, WIDTH:] = 0
        crosscoder.W_dec[1 : N_LATENTS // 2 : 2, :WIDTH] = 0
        crosscoder.b_enc[0] = -1e3
    save_dictionary(run, crosscoder, 3)
    found = evaluate(run)
    fires = N_LATENTS - found["never_fired"]
    assert fires >= N_LATENTS - 8
    firing = crosscoder.infer(scaled(heldout(run))).firings > 0
    halves = [int(firing[half : N_LATENTS // 2 : 2].sum()) for half in (0, 1)]
    assert found["shared_share"] == pytest.approx(1 - sum(halves) / fires)
    by_site = found["latents_by_site"]
    assert list(by_site) == list(SITES)
    for site, half in zip(SITES, halves, strict=True):
        assert by_site[site]["exclusive_share"] == pytest.approx(half / fires)
        assert 0 <= by_site[site]["flagged_share"] <= by_site[site]["exclusive_share"]
    page = Path(report(run)).read_text()
    assert f"<td>{100 * by_site[SITES[0]]['exclusive_share']:.2f} %</td>" in page
    assert "of these, in both by latent scaling" in page
    assert f">{100 * found['shared_share']:.2f} %</data>" in page


def test_more_sites_are_drawn_by_the_site_of_the_peak() -> None:
    """Two latents write one site each, and one writes all sites about equally.

    No latent peaks at the second site.
    """
    shares = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.4, 0.3, 0.3]])
    profiles = Profiles(("a.0", "a.1", "a.2"), shares)
    figure = render_profiles(profiles)
    assert "a.0 (2), a.0: 70.0 %" in figure
    assert "a.0 (2), a.1: 15.0 %" in figure
    assert "a.2 (1), a.2: 100.0 %" in figure
    assert "a.1 (" not in figure
    assert profiles.span(0.0) == pytest.approx(1)
    even = Profiles(("a.0", "a.1"), np.array([[0.5, 0.5]]))
    assert even.span(0.5) == pytest.approx(2)


def test_a_notebook_takes_sites_side_by_side_or_by_name(world: tuple[Run, Dictionary]) -> None:
    run, sae = world
    opened = OpenedRun(run)
    dictionary, batch = opened.dictionary(), next(opened.rows(heldout=True))
    acts = {site: next(opened.rows(heldout=True, site=site)).acts for site in SITES}
    assert torch.equal(batch.acts, torch.cat([acts[site] for site in SITES], 1))
    codes = dictionary.encode(acts, dense=True)
    assert torch.equal(dictionary.encode(batch.acts, dense=True), codes)
    x_hat = sae.infer(scaled(acts)).x_hat
    expected = torch.cat(
        [x_hat[:, :WIDTH] / SCALES[SITES[0]], x_hat[:, WIDTH:] / SCALES[SITES[1]]], 1
    )
    torch.testing.assert_close(dictionary(acts), expected)
    torch.testing.assert_close(dictionary.decode(codes), expected, rtol=1e-4, atol=1e-4)
    here, stored = dictionary.active_on("abc"), opened.active_on("abc")
    assert [(at.token, at.latents) for at in here] == [(at.token, at.latents) for at in stored]
    for one, other in zip(here, stored, strict=True):
        assert one.acts == pytest.approx(other.acts, rel=1e-6)  # few rows round differently
    assert here[0].latents
    with pytest.raises(DistSaeError, match=r"^the dictionary writes attn_out\.0, resid_post\.1,"):
        dictionary.steer(torch.nn.Linear(1, 1), 0, 1.0)
    with pytest.raises(DistSaeError, match=r"^activations: resid_post\.1 is missing; "):
        dictionary.encode({SITES[0]: raw_rows(3, WIDTH)})


@pytest.mark.system
def test_a_transcoder_is_measured_against_the_site_that_it_writes(
    world: tuple[Run, Dictionary],
) -> None:
    """The dictionary has a skip.

    The evaluation measures held-out rows, and the index measures all rows.
    """
    read, written = SITES
    sae = {"kind": "transcoder", "selection": "batch", "skip": True, "n_latents": N_LATENTS}
    sae |= {"k": 4, "auxk": 0, "reads": [read], "writes": [written]}
    settings = world[0].model_dump(mode="json") | {"name": "transcoder", "sae": sae}
    run = Run.model_validate(settings)
    dictionary = build_sae(run.sae, Widths((WIDTH,), (WIDTH,)))
    generator = torch.Generator().manual_seed(1)
    for name, tensor in dictionary.tensors():
        if name != "threshold":
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) / WIDTH**0.5)
    dictionary.get_buffer("threshold").copy_(torch.tensor([0.5, 1.0]))
    save_dictionary(run, dictionary, 3)
    opened = OpenedRun(run)

    def fvu(*units: int) -> float:
        acts = {
            site: torch.cat([b.acts for b in opened.rows(units or None, heldout=True, site=site)])
            for site in SITES
        }
        targets = SCALES[written] * acts[written]
        error = targets - dictionary.infer(SCALES[read] * acts[read]).x_hat
        return float(error.square().sum() / (targets - 0.125).square().sum())

    found, summary = evaluate(run), make_index(run)
    assert found["fvu"] == pytest.approx(fvu(), rel=1e-5)
    assert summary["fvu"] == pytest.approx(fvu(*range(summary["units"])), rel=1e-5)
    assert "fvu_by_site" not in found
    assert found["ce_spliced"] != found["ce_zero"]
    names = pq.read_schema(next(Path(summary["index"], "latents").iterdir())).names
    assert "norms" not in names


def test_latents_of_a_transcoder_are_ablated_where_it_writes(
    world: tuple[Run, Dictionary],
) -> None:
    """The codes come from the activations that the same forward pass has at the read site."""
    read, written = SITES
    sae = {"kind": "transcoder", "n_latents": N_LATENTS, "k": 4, "auxk": 0}
    sae |= {"reads": [read], "writes": [written]}
    run = Run.model_validate(world[0].model_dump(mode="json") | {"name": "ablated", "sae": sae})
    inner = build_sae(run.sae, Widths((WIDTH,), (WIDTH,)))
    generator = torch.Generator().manual_seed(1)
    for _, tensor in inner.tensors():
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
    save_dictionary(run, inner, 3)
    opened = OpenedRun(run)
    dictionary, model = opened.dictionary(), opened.model()
    tokens = torch.arange(12)[None]
    seen: dict[str, Tensor] = {}

    def note(name: str, acts: Tensor) -> Tensor:
        return seen.setdefault(name, acts)

    for site in SITES:
        attach(model, site, partial(note, site))
    with torch.no_grad():
        model(tokens)
        plain = dict(seen)
        seen.clear()
        codes = dictionary.encode(plain[read][0])
        latent = int(codes.latents[0])
        here = codes.latents == latent
        expected = plain[written][0].clone()
        expected[codes.rows[here]] -= codes.acts[here][:, None] * dictionary.decoder_rows(latent)
        with dictionary.ablate(model, latent):
            attach(model, written, partial(note, "changed"))
            model(tokens)
    torch.testing.assert_close(seen["changed"][0], expected, rtol=1e-4, atol=1e-4)
