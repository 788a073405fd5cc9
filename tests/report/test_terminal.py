"""`dist-sae latents` on a tiny language model, compared with brute force."""

import json
import re
import threading
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.commands.cli import main
from dist_sae.config import Run, dump_run
from dist_sae.config.fingerprint import run_fingerprint
from dist_sae.data.plan import load_plan
from dist_sae.data.work_queue import Worker
from dist_sae.dictionaries import build_sae
from dist_sae.producing.loop import produce
from dist_sae.producing.planner import plan
from dist_sae.storage import open_store
from dist_sae.telemetry.exporter import Telemetry
from tests.index.indexed import Oracle, make_index
from tests.models.test_huggingface import D, hf, save_model
from tests.world import save

LATENTS = 32


class World(NamedTuple):
    run: Run
    place: str
    """The run's folder."""
    sae: Any
    oracle: Oracle


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """An indexed run on a word-level language model. Latent 31 never fires."""
    folder = tmp_path_factory.mktemp("language")
    words = torch.randint(3, 50, (60, 20), generator=torch.Generator().manual_seed(0)).tolist()
    text = "\n".join(" ".join(f"w{word}" for word in document) for document in words)
    (folder / "text.txt").write_text(text)
    model = str(save_model(folder / "model", "llama"))
    run = Run.model_validate(
        {
            "name": "language",
            "store": {"activations": str(folder / "a"), "runs": str(folder / "r")},
            "model": {"kind": "huggingface", "path": model, "dtype": "fp32", "batch_tokens": 128},
            "corpus": {
                "kind": "files",
                "files": [str(folder / "text.txt")],
                "txt_documents": "line",
            },
            "activations": {
                "sites": ["resid_post.1"],
                "streams": 2,
                "unit_rows": 200,
                "context_tokens": 16,
                "heldout_share": 0.2,
                "dtype": "fp32",
                "exclude": {"over_norm": None},
            },
            "sae": {"kind": "topk", "n_latents": LATENTS, "k": 4, "auxk": 0},
            "train": {"rows": 640, "batch_rows": 64},
        }
    ).resolved()
    plan(run)
    produce(run, Worker("p"), threading.Event(), Telemetry("language", "produce", None))
    sae = build_sae(run.sae, D)
    generator = torch.Generator().manual_seed(3)
    for _, tensor in sae.tensors():
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
    sae.b_enc.data[-1] = -1e3
    sae.constrain()
    tensors = {name: tensor.detach() for name, tensor in sae.tensors()}
    tensors["idle_rows"] = torch.zeros(LATENTS, dtype=torch.int64)
    runs, made = open_store(run.store.runs), load_plan(open_store(run.store.activations), run)
    scalars = {
        "scale": 1.5,
        "mean": [0.25] * D,
        "variance": 1.0,
        "rows": 1,
        "plan": made.hash,
        "run": run_fingerprint(run),
    }
    save(Checkpoints(runs, run.name, 2), 10, tensors, scalars)
    runs.put("language/run.yaml", dump_run(run).encode())
    make_index(run)
    return World(run, f"{run.store.runs}/language", sae, Oracle(run, sae))


def ask(world: World, capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main(["latents", world.place, *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def lines(world: World, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["latents", world.place, *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def top_tokens_of(world: World, latent: int, most: int = 64) -> list[int]:
    """Return the tokens of the largest activations, in descending order of activation."""
    firings = sorted(world.oracle.firings(latent), key=lambda firing: (-firing[0], firing[1]))
    return [world.oracle.names[row][2] for _, row in firings[:most]]


@pytest.mark.system
def test_a_latent_is_shown_with_its_texts_and_output_tokens(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    latent = int((world.oracle.codes > 0).sum(0).argmax())
    (shown,) = ask(world, capsys, str(latent))
    firings = world.oracle.firings(latent)
    assert shown["firings"] == len(firings)
    best = shown["texts"][0]
    assert best["act"] == max(act for act, _ in firings)
    assert best["tokens"][best["peak"]].strip() == f"w{top_tokens_of(world, latent)[0]}"
    # activations of all tokens around the peak, which are in the postings
    known: dict[int, dict[int, float]] = {names[4]: {} for names in world.oracle.names}
    for act, row in firings:
        known[world.oracle.names[row][4]][world.oracle.names[row][3]] = act
    start = best["position"] - best["peak"]
    acts = [known[best["document"]].get(start + i, 0) for i in range(len(best["tokens"]))]
    assert best["acts"] == acts
    assert len(shown["decile_texts"]) == 10
    model = hf.AutoModelForCausalLM.from_pretrained(world.run.model.path)  # type: ignore[union-attr]
    row = world.sae.W_dec[latent].detach().double()
    effects = (row * model.model.norm.weight.double()) @ model.lm_head.weight.double().T
    effects = (effects - effects.mean()).detach().numpy()
    order = np.argsort(-effects)
    assert [each["token"] for each in shown["top_tokens"]] == order[:10].tolist()
    assert [each["token"] for each in shown["bottom_tokens"]] == order[::-1][:10].tolist()
    assert [e["logit"] for e in shown["top_tokens"]] == pytest.approx(effects[order[:10]], rel=1e-4)
    assert shown["top_tokens"][0]["text"].strip("</>") == {0: "s", 1: "s", 2: "?"}.get(
        int(order[0]), f"w{order[0]}"
    )


def test_lines_fit_and_hold_the_peak_in_brackets(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    latent = int((world.oracle.codes > 0).sum(0).argmax())
    shown = lines(world, capsys, str(latent), "31")
    assert all(len(line) <= 100 for line in shown)
    assert "\033" not in "".join(shown)  # the output is not a terminal
    assert shown[0] == f"latent {latent}"
    count = len(world.oracle.firings(latent))
    assert f"({count:,} times), denser than" in shown[1]
    peak = next(line for line in shown if "[" in line)
    assert f"[w{top_tokens_of(world, latent)[0]}]" in peak
    dead = shown[shown.index("latent 31") :]
    assert "on 0 % of rows (0 times), denser than 0 % of latents" in dead[1]
    assert not any("[" in line for line in dead)


def test_the_overview_has_the_densest_and_the_rarest(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = (world.oracle.codes > 0).sum(0)
    found = ask(world, capsys)
    assert found["never_fired"] == int((counts == 0).sum()) >= 1
    alive = np.sort(counts[counts > 0])
    assert [each["firings"] for each in found["densest"]] == alive[::-1][:5].tolist()
    assert [each["firings"] for each in found["rarest"]] == alive[:5][::-1].tolist()
    first = found["densest"][0]
    common = Counter(top_tokens_of(world, first["latent"])).most_common(1)[0][1]
    word = int(first["fires_on"][0].strip().removeprefix("w"))
    assert top_tokens_of(world, first["latent"]).count(word) == common
    assert lines(world, capsys)[1] == "densest:"


def test_latents_are_found_by_a_token_and_by_a_pattern(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, tokens in ((("--token", "w7"), {7}), (("--regex", "^w4.$"), set(range(40, 50)))):
        found = ask(world, capsys, *arguments)
        shares = {}
        for latent in range(LATENTS):
            top = top_tokens_of(world, latent)
            hits = sum(token in tokens for token in top)
            if hits and len(top) >= 8:
                shares[latent] = hits / len(top)
        assert found["matching"] == len(shares) > 3
        order = [each["share"] for each in found["latents"]]
        assert order == sorted(shares.values(), reverse=True)[:20]
        assert all(shares[each["latent"]] == each["share"] for each in found["latents"])


def test_latents_like_one_are_its_neighbours(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    directions = torch.nn.functional.normalize(world.sae.W_dec.detach().double())
    cosines = (directions @ directions[5]).index_fill_(0, torch.tensor([5]), -2)
    found = ask(world, capsys, "--like", "5")
    assert [each["latent"] for each in found["nearest"]] == cosines.topk(10).indices.tolist()
    assert found["nearest"][0]["cosine"] == pytest.approx(float(cosines.max()), abs=1e-6)
    phis = [each["phi"] for each in found["coactive"]]
    assert phis == sorted(phis, reverse=True)
    assert len(phis) > 3


def test_latents_on_a_text_are_those_of_the_model(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """The latents of a corpus document are those of its rows."""
    document = min(names[4] for names in world.oracle.names)
    text = (Path(world.run.store.runs).parent / "text.txt").read_text().splitlines()[document]
    found = ask(world, capsys, "--text", text)
    assert len(found) == 20
    for row, (_, _, _, position, of) in enumerate(world.oracle.names):
        if of == document:
            codes = world.oracle.codes[row]
            assert found[position]["latents"][0] == int(codes.argmax())
            assert found[position]["acts"][0] == pytest.approx(float(codes.max()), rel=2e-3)
    assert lines(world, capsys, "--text", "w3 w4")[0].startswith('"w3"')


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["99"], r"latent 99: .* has latents 0 to 31"),
        (["--like", "-1"], r"latent -1: .* has latents 0 to 31"),
        (["--index", "other"], r"has no index other; it has: step-00000010"),
        (
            ["--token", "w7 w8"],
            r'error: token: "w7 w8" is not one token of the model but 2: "w7", "',
        ),
        (["--regex", "w("], r"error: regex: 'w\(' is not a regular expression"),
    ],
)
def test_what_cannot_be_answered_is_one_line(
    world: World, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    assert main(["latents", world.place, *arguments]) == 2
    errors = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(text, errors[0]), errors


def test_without_the_model_numbers_are_shown_and_what_is_left_out_is_said(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(world.run.model.path)  # type: ignore[union-attr]
    model.rename(model.with_name("moved"))
    try:
        assert main(["latents", world.place, "3", "--json"]) == 0
        said = capsys.readouterr()
        (shown,) = json.loads(said.out)
        for arguments in (("--token", "w7"), ("--text", "w3")):
            assert main(["latents", world.place, *arguments]) == 2
            (error,) = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error")]
            assert f"model.path {model}: cannot be loaded" in error
    finally:
        model.with_name("moved").rename(model)
    assert shown["texts"] == []
    assert shown["examples"]
    assert shown["top_tokens"][0]["text"] == f"#{shown['top_tokens'][0]['token']}"
    assert f"texts are left out: model.path {model}" in said.err
