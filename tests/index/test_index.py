"""The latent index compared with brute force, and settings that leave parts out."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

import dist_sae.index.coactive
import dist_sae.index.layout
import dist_sae.index.merge
from dist_sae.dictionaries.base import Dictionary
from dist_sae.index.coactive import LEAST_ROWS, MOST_PAIRS
from dist_sae.index.layout import HISTOGRAM_BARS
from tests.index.indexed import (
    RECIPES,
    Oracle,
    add_checkpoint,
    files,
    make_index,
    produced,
    tables,
)


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    # 64 latents in two whole buckets and a partial one
    monkeypatch.setattr(dist_sae.index.layout, "LEAST_LATENTS", 24)


def check(place: str, result: dict[str, object], oracle: Oracle) -> None:
    """Compare everything in an index with brute force."""
    assert result["rows"] == len(oracle.codes)
    assert result["fvu"] == pytest.approx(oracle.fvu, rel=1e-6)
    assert result["l0"] == pytest.approx(oracle.l0, rel=1e-12)
    assert result["never_fired"] == (oracle.codes == 0).all(0).sum() > 0
    check_postings(place, oracle)
    check_latents(place, oracle)
    check_examples(place, oracle)


def check_postings(place: str, oracle: Oracle) -> None:
    found = tables(place, "postings").to_pylist()
    expected = [
        {"latent": n, "unit": oracle.names[row][0], "row": oracle.names[row][1], "act": act}
        for n in range(oracle.codes.shape[1])
        for act, row in oracle.firings(n)
    ]
    assert found == expected


def check_latents(place: str, oracle: Oracle) -> None:
    found = tables(place, "latents").to_pylist()
    assert [line["latent"] for line in found] == list(range(oracle.codes.shape[1]))
    for line in found:
        acts = np.sort([act for act, _ in oracle.firings(line["latent"])])
        assert line["firings"] == len(acts)
        assert line["density"] == pytest.approx(len(acts) / len(oracle.codes), rel=1e-12)
        if not len(acts):
            assert (line["max"], line["mean"]) == (0, 0)
            assert line["deciles"] == [0] * 9
            assert line["histogram"] == [0] * HISTOGRAM_BARS
            continue
        assert line["max"] == acts[-1]
        assert line["mean"] == pytest.approx(acts.mean(), rel=1e-6)
        begins = [min(-(-len(acts) * d // 10), len(acts) - 1) for d in range(1, 10)]
        assert line["deciles"] == acts[begins].tolist()
        edges = np.linspace(0, acts[-1], HISTOGRAM_BARS + 1)
        assert line["histogram"] == np.histogram(acts, edges)[0].tolist()


def check_weights(place: str, sae: Dictionary) -> None:
    W_dec, W_enc = (W.detach().double().numpy() for W in (sae.W_dec, sae.W_enc))
    unit = W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True)
    cosines = unit @ unit.T
    for line in tables(place, "latents").to_pylist():
        n = line["latent"]
        assert line["decoder_norm"] == pytest.approx(np.linalg.norm(W_dec[n]), rel=1e-6)
        assert line["encoder_norm"] == pytest.approx(np.linalg.norm(W_enc[n]), rel=1e-6)
        assert line["encoder_bias"] == sae.b_enc[n]
        others = [m for m in np.argsort(-cosines[n]) if m != n][:16]
        assert line["nearest"] == others
        assert line["nearest_cosine"] == pytest.approx(cosines[n, others], rel=1e-6)


def check_examples(place: str, oracle: Oracle, top: int = 6, per_decile: int = 2) -> None:
    found = defaultdict(list)
    for line in tables(place, "examples").to_pylist():
        found[line.pop("latent")].append(line)
    for n in range(oracle.codes.shape[1]):
        firings = oracle.firings(n)
        largest = sorted(firings, key=lambda firing: (-firing[0], firing[1]))[:top]
        lines = found.pop(n, [])
        for line, (act, row) in zip(lines, largest, strict=False):
            unit, number, token, position, document = oracle.names[row]
            assert line == {
                "decile": -1,
                "act": act,
                "unit": unit,
                "row": number,
                "token": token,
                "position": position,
                "document": document,
            }
        sampled = lines[len(largest) :]
        if len(firings) <= top:
            assert not sampled
            continue
        # each tenth of the activations, by rank, gives its number of distinct rows
        assert [line["decile"] for line in sampled] == [d // 2 for d in range(10 * per_decile)] or (
            len(firings) < 10 * per_decile
        )
        ascending = [act for act, _ in sorted(firings)]
        rows = {oracle.names[row][:2]: act for act, row in firings}
        for line in sampled:
            low = len(firings) * line["decile"] // 10
            high = -(-len(firings) * (line["decile"] + 1) // 10)
            assert ascending[low] <= line["act"] <= ascending[high - 1]
            assert rows[line["unit"], line["row"]] == line["act"]
        assert len({(line["unit"], line["row"]) for line in sampled}) == len(sampled)
    assert not found


def check_pairs(place: str, codes: "np.typing.NDArray[np.float32]") -> None:
    """Compare phi with the correlation coefficient of the two latents' being active."""
    found = defaultdict(list)
    for line in tables(place, "pairs").to_pylist():
        found[line.pop("latent")].append(line)
    active = (codes > 0).astype(np.float64)
    together = active.T @ active
    products = codes.T.astype(np.float64) @ codes
    for n in range(codes.shape[1]):
        others = [m for m in range(codes.shape[1]) if m != n and together[n, m] >= LEAST_ROWS]
        lines = found.pop(n, [])
        assert len(lines) == min(len(others), MOST_PAIRS)
        phis = {}
        for m in others:
            constant = active[:, m].all() or active[:, n].all()
            phis[m] = 0.0 if constant else np.corrcoef(active[:, n], active[:, m])[0, 1]
        best = sorted(phis.values(), reverse=True)
        for line, phi in zip(lines, best, strict=False):
            m = line["other"]
            assert line["phi"] == pytest.approx(phi, abs=1e-6)
            assert phis[m] == pytest.approx(phi, abs=1e-6)
            assert line["count"] == together[n, m]
            assert line["product"] == pytest.approx(products[n, m], rel=1e-5)


@pytest.mark.system
@pytest.mark.parametrize("kind", RECIPES)
def test_an_index_is_what_brute_force_finds(tmp_path: Path, kind: str) -> None:
    run = produced(tmp_path, kind, index={"pairs": 10**9})
    sae = add_checkpoint(run)
    result = make_index(run)
    oracle = Oracle(run, sae)
    assert any(len(oracle.firings(n)) > 200 for n in range(64))
    check(result["index"], result, oracle)
    check_weights(result["index"], sae)
    check_pairs(result["index"], oracle.codes)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_rows_are_encoded_as_they_are_stored(tmp_path: Path, dtype: str) -> None:
    run = produced(tmp_path, activations={"dtype": dtype})
    sae = add_checkpoint(run)
    result = make_index(run)
    check(result["index"], result, Oracle(run, sae))


@pytest.mark.system
@pytest.mark.parametrize("most", [200, 700])
def test_buckets_larger_than_memory_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Buckets too large for memory give the same files, except that postings are cut differently.

    They are merged in ranges of latents. A latent that is still too large is merged unit by unit.
    """
    run = produced(tmp_path, "jumprelu")
    add_checkpoint(run)
    whole = make_index(run)
    monkeypatch.setattr(dist_sae.index.merge, "MOST_ENTRIES", most)
    cut = make_index(run.model_copy(update={"index": run.index.model_copy(update={"name": "c"})}))
    expected, found = files(whole["index"]), files(cut["index"])
    for name, data in expected.items():
        if not name.startswith("postings/"):
            assert found[name] == data, name
    assert tables(cut["index"], "postings") == tables(whole["index"], "postings")
    assert len(found) > len(expected) + 10


def test_parts_that_are_set_to_0_are_left_out_and_said(tmp_path: Path) -> None:
    nothing = {"neighbours": 0, "output_tokens": 0, "pairs": 0, "postings": "none"}
    run = produced(tmp_path, index={"examples": 6, "decile_examples": 2, **nothing})
    sae = add_checkpoint(run)
    result = make_index(run)
    assert result["left_out"] == (
        "nearest latents (index.neighbours: 0); output tokens (index.output_tokens: 0); "
        "coactive latents (index.pairs: 0); postings (index.postings: none)"
    )
    place, oracle = result["index"], Oracle(run, sae)
    check_latents(place, oracle)
    check_examples(place, oracle)
    found = tables(place, "latents").to_pydict()
    for name in ("nearest", "nearest_cosine", "top_tokens", "bottom_logits"):
        assert found[name] == [[]] * 64
    assert not list(Path(place).glob("pairs/*"))


@pytest.mark.system
def test_as_many_nearest_latents_are_kept_as_are_asked_for(tmp_path: Path) -> None:
    run = produced(tmp_path)
    add_checkpoint(run)
    few = run.model_copy(
        update={"index": run.index.model_copy(update={"neighbours": 3, "name": "f"})}
    )
    nearest = tables(make_index(run)["index"], "latents")["nearest"].to_pylist()
    result = make_index(few)
    assert tables(result["index"], "latents")["nearest"].to_pylist() == [n[:3] for n in nearest]
    assert result["left_out"] == "output tokens (no language-model head is available for the site)"
