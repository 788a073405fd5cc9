"""`bench synth` without sae-lens: rows on disk, our trainer, and orchestration with a fake."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dist_sae.bench import synth
from dist_sae.bench.peers.environments import Peer, PeerError
from dist_sae.bench.peers.processes import run_script
from dist_sae.bench.synth import run_dist_sae
from dist_sae.bench.synth.detection import f1_at_l0
from dist_sae.bench.synth.drawing import sampler
from dist_sae.bench.synth.orthogonal import orthogonalize
from dist_sae.bench.synth.rows import HELDOUT, TRAINING, Rows, RowsWriter
from dist_sae.bench.synth.worlds import DIST_SAE, SAE_LENS, Trainer, find_world, parse_trainer
from dist_sae.distributed.local_ranks import rank_environments
from dist_sae.errors import ConfigError

N_FEATURES, D_IN = 24, 8
OURS = Trainer(DIST_SAE, "topk", {"k": 2})
THEIRS = Trainer(SAE_LENS, "topk", {"k": 2, "train.lr": 0.5})
CLASSIFICATION = {"precision": 0.5, "recall": 0.75, "f1_score": 0.6, "accuracy": 0.9}
SCORES = {
    "true_l0": 3.0, "sae_l0": 2.0, "dead_latents": 1, "shrinkage": 0.9, "explained_variance": 0.75,
    "mcc": 0.7, "uniqueness": 0.8, "classification": CLASSIFICATION, "version": "6",
    "f1_at_l0": 0.65,
}  # fmt: skip


def drawn(rows: int, seed: int = 0) -> Tensor:
    """Return strengths of features, [rows, features], about two per row."""
    generator = torch.Generator().manual_seed(seed)
    fires = torch.rand(rows, N_FEATURES, generator=generator) < 2 / N_FEATURES
    return fires * (10 + 10 * torch.rand(rows, N_FEATURES, generator=generator))


def write_world(folder: Path, rows: int = 512) -> Tensor:
    """Write a small world to a folder; return the feature strengths of its training rows."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(N_FEATURES, D_IN, generator=generator)
    np.save(folder / "directions.npy", (directions / directions.norm(dim=1)[:, None]).numpy())
    np.save(folder / "bias.npy", np.full(D_IN, 0.25, np.float32))
    fired = drawn(rows)
    for part, strengths in ((TRAINING, fired), (HELDOUT, drawn(64, seed=2))):
        writer = RowsWriter()
        for some in torch.split(strengths, 100):
            writer.add(some)
        writer.write(folder, part)
    return fired


def comparison(**changes: Any) -> synth.Comparison:
    settings: dict[str, Any] = {
        "world": find_world("small"), "trainers": (OURS, THEIRS), "rows": 70, "n_latents": 16,
        "batch": 16, "lr": 1e-3, "seeds": (3,), "shards": (1, 2), "products": "fp32", "threads": 2,
        "l0": 1.5,
    }  # fmt: skip
    return synth.Comparison(**(settings | changes))


class Scripts:
    """Fake of the processes that records the specs it gets and returns fixed results."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: list[tuple[str, dict[str, Any], int]] = []
        self.failing = ""
        monkeypatch.setattr(synth, "run_script", self.run)
        monkeypatch.setattr(synth, "ensure_environment", lambda *_: Path(sys.executable))

    def run(
        self, peer: Peer, _: Path, __: Path, spec: Mapping[str, Any], *___: Any, **others: Any
    ) -> dict[str, Any]:
        self.told.append((peer.name, dict(spec), len(others["ranks"])))
        if self.failing in (spec["action"], peer.name):
            raise PeerError("out of ideas")
        if spec["action"] == "score":
            return SCORES
        return {"seconds": 4.0, "version": "1", "out": f"from {peer.name}"}


def test_rows_are_the_sum_of_the_features_that_fire(tmp_path: Path) -> None:
    fired = write_world(tmp_path)
    rows, which = Rows(tmp_path, TRAINING), np.array([7, 3, 511, 3])
    assert torch.equal(rows.feature_strengths(which), fired[which])
    expected = fired[which].double() @ rows.directions.double() + 0.25
    torch.testing.assert_close(rows.batch(which).double(), expected, atol=1e-5, rtol=0)


def test_directions_are_those_of_the_loss_over_all_pairs() -> None:
    start = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = (start / start.norm(dim=1, keepdim=True)).requires_grad_()
    optimizer = torch.optim.Adam([expected], lr=1e-2)
    for _ in range(20):  # like sae-lens, by autograd
        products = expected @ expected.T
        on_itself = products.diagonal()
        between = (products - torch.diag(on_itself)).square().sum()
        optimizer.zero_grad()
        (between + 12 * (on_itself - 1).square().sum()).backward()
        optimizer.step()
    expected = (expected / expected.norm(dim=1, keepdim=True)).detach()
    torch.testing.assert_close(orthogonalize(start, 20, 1e-2), expected, atol=1e-12, rtol=0)
    assert orthogonalize(start, 0, 1e-2).allclose(start / start.norm(dim=1, keepdim=True))


def node(feature: int | None, *children: Any, excludes: bool, scales: bool) -> SimpleNamespace:
    return SimpleNamespace(
        feature_index=feature,
        children=children,
        mutually_exclusive_children=excludes,
        scale_children_by_parent=scales,
    )


def leaves(*features: int) -> list[SimpleNamespace]:
    return [node(feature, excludes=False, scales=False) for feature in features]


def generator_of(n_features: int) -> SimpleNamespace:
    """Return a generator like sae-lens's; without parents a feature fires in .4 to .9 of rows."""
    random = torch.Generator().manual_seed(0)
    factor = 0.3 * torch.randn(n_features, 2, generator=random)
    return SimpleNamespace(
        low_rank_correlation=(factor, (1 - factor.square().sum(1)).sqrt()),
        correlation_thresholds=torch.linspace(-1.3, 0.3, n_features),
        mean_firing_magnitudes=torch.linspace(1, 2, n_features),
        std_firing_magnitudes=torch.full((n_features,), 1.5),
        sample=lambda rows: f"{rows} of its own",
    )


def drawn_by_definition(generator: Any, nodes: list[Any], rows: int) -> Tensor:
    """Draw like sae-lens: all features of all rows, then children by level, then siblings."""
    (factor, scale), n_features = generator.low_rank_correlation, 12
    common, own = torch.randn(rows, factor.shape[1]), torch.randn(rows, n_features)
    row, feature = (common @ factor.T + own * scale > generator.correlation_thresholds).nonzero().T
    strengths, mean = torch.zeros(rows, n_features), generator.mean_firing_magnitudes
    noise = torch.randn(len(row)) * generator.std_firing_magnitudes[feature]
    strengths[row, feature] = (mean[feature] + noise).relu()
    levels = [nodes[:2], nodes[2:7], nodes[7:]]
    for level in levels:
        conflicts = [
            (r, of, fire)
            for r in range(rows)
            for of in level
            if of.mutually_exclusive_children and strengths[r, of.feature_index] > 0
            if len(fire := [c for c in of.children if strengths[r, c.feature_index] > 0]) > 1
        ]
        for (r, of, fire), scores in zip(conflicts, torch.rand(len(conflicts), 3), strict=True):
            score_of = {c.feature_index: s for c, s in zip(of.children, scores, strict=False)}
            winner = max(fire, key=lambda c: score_of[c.feature_index])
            for loser in fire:
                strengths[r, loser.feature_index] *= loser is winner
        for of in level:
            parent = strengths[:, of.feature_index]
            by = parent / mean[of.feature_index] if of.scale_children_by_parent else parent > 0
            for child in of.children:
                strengths[:, child.feature_index] *= by
    return strengths


def test_rows_are_drawn_as_if_every_feature_were_looked_at() -> None:
    deep = node(9, *leaves(1, 0, 3), excludes=False, scales=False)
    tall = node(7, *leaves(11, 2), excludes=True, scales=True)
    roots = [
        node(10, tall, *leaves(4), excludes=True, scales=False),
        node(5, deep, *leaves(6, 8), excludes=True, scales=True),
    ]
    nodes = [*roots, *roots[0].children, *roots[1].children, *tall.children, *deep.children]
    generator = generator_of(12)
    sample = sampler(generator, SimpleNamespace(roots=roots))
    for rows in (1, 60, 7):
        torch.manual_seed(rows)
        expected, then = drawn_by_definition(generator, nodes, rows), torch.rand(1)
        torch.manual_seed(rows)
        assert torch.equal(sample(rows).to_dense(), expected)
        assert torch.equal(torch.rand(1), then)  # the same number of random numbers was drawn
    # a world without trees, one where nothing fires, and one that only sae-lens can draw
    assert (sampler(generator, None)(50).to_dense() > 0).float().mean() > 0.5
    generator.correlation_thresholds = torch.full((12,), 99.0)
    assert sample(3).to_dense().count_nonzero() > 0
    assert sampler(generator, SimpleNamespace(roots=roots))(3).to_dense().count_nonzero() == 0
    unnamed = SimpleNamespace(roots=[node(None, *leaves(1), excludes=False, scales=False)])
    assert sampler(generator, unnamed)(3) == "3 of its own"


def test_f1_at_an_l0_leaves_the_largest_codes_of_all_latents() -> None:
    # latents 0 and 1 are most similar to features 2 and 0; latent 1's decoder row has norm 2.2
    W_dec = torch.tensor([[0.1, -1.0], [2.0, 0.9]])
    directions = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 3.0]])
    codes = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.1], [2.5, 0.0]])
    strengths = torch.tensor([[0.0, 1.0, 1.0], [2.0, 0.0, 0.0], [3.0, 0.0, 1.0], [0.0, 0.0, 0.0]])

    def f1(l0: float) -> float | None:
        batches = zip(torch.split(codes, 3), torch.split(strengths, 3), strict=True)
        return f1_at_l0(batches, W_dec, directions, l0)

    # sizes times decoder norms in four rows: 4.4 of latent 1, 3, 2.5, 2.4 of latent 1, and 1 of
    # latent 0; F1 is 2 right / (active + fired): feature 2 fires in rows 0 and 2, feature 0 in 1
    # and 2
    assert f1(1 / 4) == pytest.approx((0 + 2 / 3) / 2)
    assert f1(2 / 4) == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert f1(3 / 4) == pytest.approx((2 * 1 / (2 + 2) + 2 / 3) / 2)
    assert f1(4 / 4) == pytest.approx((1 / 2 + 1) / 2)
    assert f1(5 / 4) == pytest.approx((2 * 2 / (3 + 2) + 1) / 2)
    assert f1(6 / 4) is None  # only five codes are active


def test_rows_without_any_feature_are_the_bias(tmp_path: Path) -> None:
    write_world(tmp_path)
    writer = RowsWriter()
    writer.add(torch.zeros(3, N_FEATURES))
    writer.write(tmp_path, HELDOUT)
    rows = Rows(tmp_path, HELDOUT)
    assert len(rows) == 3
    assert torch.equal(rows.batch(np.arange(3)), torch.full((3, D_IN), 0.25))


def test_batches_have_each_row_once_a_pass_in_an_order_of_the_seed(tmp_path: Path) -> None:
    write_world(tmp_path, rows=30)
    rows = Rows(tmp_path, TRAINING)
    all_rows = rows.batch(np.arange(30))
    first, other = (torch.cat(list(rows.batches(12, 5, seed))) for seed in (0, 1))
    for one_pass in (first[:30], first[30:]):
        found = (one_pass[:, None] == all_rows).all(2).float().sum(0)
        same = (all_rows[:, None] == all_rows).all(2).float().sum(0)  # rows may be equal
        assert torch.equal(found, same)
    assert torch.equal(first, torch.cat(list(rows.batches(12, 5, 0))))
    assert not torch.equal(first, other)


def spec_of(folder: Path, shards: int, **changes: Any) -> dict[str, Any]:
    chosen = comparison(rows=4096, batch=128, n_latents=N_FEATURES, lr=5e-3)
    work = folder / f"work-{shards}"
    work.mkdir()
    return chosen.spec(OURS, shards, 0) | {"folder": str(folder), "work": str(work)} | changes


def train_ours(spec: Mapping[str, Any], shards: int, python: Path) -> dict[str, Any]:
    script = Path(run_dist_sae.__file__)
    ranks = rank_environments(shards, shards) if shards > 1 else [{}]
    work = Path(spec["work"])
    return run_script(
        Peer("dist-sae", None, ""), python, script, spec, work, threads=1, ranks=ranks,
    )  # fmt: skip


@pytest.mark.system
def test_our_trainer_gives_sae_lens_the_same_dictionary_from_one_rank_and_from_two(
    tmp_path: Path, preloaded: dict[str, Path]
) -> None:
    write_world(tmp_path, rows=4096)
    exports = []
    for shards in (1, 2):
        result = train_ours(spec_of(tmp_path, shards), shards, preloaded["python"])
        assert result["seconds"] > 0
        out = Path(result["out"])
        assert json.loads((out / "cfg.json").read_text())["k"] == 2
        exports.append(load_file(out / "sae_weights.safetensors"))
    alone, sharded = exports
    for name, tensor in alone.items():
        torch.testing.assert_close(sharded[name], tensor, atol=1e-4, rtol=1e-4)
    x = Rows(tmp_path, HELDOUT).batch(np.arange(64))
    z = (x - alone["b_dec"]) @ alone["W_enc"] + alone["b_enc"]
    kept = z.relu() * (z >= z.topk(2).values[:, -1:])
    x_hat = kept @ alone["W_dec"] + alone["b_dec"]
    # in the rows' own scale, ten times that of training; with b_dec alone the FVU would be 1
    assert float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()) < 0.4


def test_every_trainer_runs_with_every_seed_and_ours_with_every_number_of_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = Scripts(monkeypatch)
    result = synth.bench_synth(comparison(seeds=(3, 4)), tmp_path)
    trained = [(name, spec, ranks) for name, spec, ranks in scripts.told if "kind" in spec]
    assert [(name, spec["seed"], ranks) for name, spec, ranks in trained] == [
        (name, seed, ranks)
        for seed in (3, 4)
        for name, ranks in (("dist-sae", 1), ("dist-sae", 2), ("sae-lens", 1))
    ]
    assert [spec["threads"] for _, spec, _ in trained[:3]] == [2, 1, 2]
    theirs = trained[2][1]
    # the trainer's settings are separate from the dictionary's; 70 rows give 4 batches of 16
    assert (theirs["settings"], theirs["train"], theirs["steps"]) == ({"k": 2}, {"lr": 0.5}, 4)
    scored = [spec for _, spec, _ in scripts.told if spec["action"] == "score"]
    assert [spec["out"] for spec in scored[:3]] == [
        "from dist-sae",
        "from dist-sae",
        "from sae-lens",
    ]
    assert {spec["l0"] for spec in scored} == {1.5}
    first = result["dictionaries"][0]
    expected = {"l0": 2, "fvu": 0.25, "f1": 0.6, "precision": 0.5, "recall": 0.75, "mcc": 0.7}
    assert {key: first[key] for key in expected} == expected
    assert (first["uniqueness"], first["dead"], first["seconds"]) == (0.8, 1, 4)
    assert first["f1_at_l0"] == 0.65
    assert (first["rows"], result["rows"]) == (64, 64)


def test_a_world_is_made_once_for_each_number_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = Scripts(monkeypatch)
    for rows in (70, 70, 90):
        synth.bench_synth(comparison(rows=rows, trainers=(THEIRS,)), tmp_path)
    made = [spec for _, spec, _ in scripts.told if spec["action"] == "make"]
    assert [spec["rows"] for spec in made] == [64, 80]
    assert made[0]["folder"] != made[1]["folder"]


def test_a_world_that_was_left_half_made_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = Scripts(monkeypatch)
    scripts.failing = "make"
    with pytest.raises(ConfigError, match="sae-lens could not generate world small: out of ideas"):
        synth.bench_synth(comparison(), tmp_path)
    scripts.failing = ""
    synth.bench_synth(comparison(trainers=(THEIRS,)), tmp_path)
    assert [spec["action"] for _, spec, _ in scripts.told] == ["make", "make", "train", "score"]


def test_a_trainer_that_fails_is_a_row_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = Scripts(monkeypatch)
    scripts.failing = "dist-sae"
    result = synth.bench_synth(comparison(shards=(1,)), tmp_path)
    ours, theirs = result["dictionaries"]
    assert (ours["error"], ours["f1"], theirs["error"]) == ("out of ideas", None, None)
    lines = synth.render_table(result).splitlines()
    assert lines[-1] == "dist_sae topk: ERROR: out of ideas"
    assert " ".join(lines[3].split()) == (
        "sae-lens topk k=2 train.lr=0.5 1 3 2.0 0.2500 0.600 0.500 0.750 0.650 0.700 0.800 1 4"
    )
    assert "f1 precision recall f1 at 1.5 mcc" in " ".join(lines[1].split())


def test_trainers_are_parsed_as_yaml() -> None:
    trainer = parse_trainer(SAE_LENS, ["matryoshka_batchtopk", "k=8", "widths=[2, 8]", "a=x"])
    assert trainer == Trainer(
        SAE_LENS, "matryoshka_batchtopk", {"k": 8, "widths": [2, 8], "a": "x"}
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 15}, "--rows 15: less than one batch of 16"),
        ({"l0": 0}, "--l0 0: must be above 0"),
        (
            {"trainers": [Trainer(DIST_SAE, "topkk", {"k": 2})]},
            "unknown kind topkk; did you mean topk",
        ),
        ({"trainers": [Trainer(DIST_SAE, "topk", {"k": 99})]}, "k .99. must not exceed n_latents"),
        ({"trainers": [Trainer(DIST_SAE, "topk", {"k": 2, "train.foo": 1})]}, "train.foo"),
        (
            {"trainers": [Trainer(DIST_SAE, "routed", {"k": 2, "experts": 2})]},
            "does not support this kind",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    scripts = Scripts(monkeypatch)
    with pytest.raises(ConfigError, match=message):
        synth.bench_synth(comparison(**changes), tmp_path)
    assert not scripts.told


def test_sae_lens_that_cannot_be_installed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ensure(*_: object) -> Path:
        raise PeerError("no such release")

    monkeypatch.setattr(synth, "ensure_environment", ensure)
    with pytest.raises(ConfigError, match="could not be installed: no such release"):
        synth.bench_synth(comparison(), tmp_path)


@pytest.mark.parametrize("words", [["topk", "k"], ["topk", "=3"], ["topk", "k=[1"]])
def test_settings_that_are_none_are_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="topk"):
        parse_trainer(DIST_SAE, words)


def test_worlds_are_named_or_folders_that_sae_lens_saved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither small nor 16k, nor a folder"):
        find_world(str(tmp_path))
    (tmp_path / "synthetic_model_config.json").write_text("{}")
    world = find_world(str(tmp_path))
    assert (world.name, world.model) == (tmp_path.name, str(tmp_path))
