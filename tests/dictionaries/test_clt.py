"""Cross-layer transcoders: causality, layer layout and recovery of computations across layers."""

import re
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dist_sae.config.clt import CLTConfig
from dist_sae.config.dictionary import DictionaryConfig
from dist_sae.config.sae import CLTJumpReLUConfig
from dist_sae.dictionaries import build_sae
from dist_sae.dictionaries.axis import WHOLE
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.init import geometric_median
from dist_sae.dictionaries.interface import Rows, Widths
from dist_sae.errors import ConfigError
from dist_sae.kernels import select
from dist_sae.kernels.choice import choose_kernels
from tests.dictionaries.recipes import (
    BATCH,
    CONFIGS,
    D_IN,
    LAYERS,
    N_LATENTS,
    make,
    relative_error,
    rows,
    sae_rows,
    some_dead,
    step,
)
from tests.dictionaries.reference import across_layers
from tests.dictionaries.worlds import train

D = D_IN // len(LAYERS)


def sites(name: str, layers: int) -> tuple[str, ...]:
    return tuple(f"{name}.{layer}" for layer in range(layers))


def test_one_layer_has_the_loss_of_topk_over_the_batch() -> None:
    """A one-layer CLT has BatchTopK's loss if its b_enc includes BatchTopK's input centering."""
    topk = make(CONFIGS["batchtopk"])
    of_layer = {"reads": None, "n_latents": N_LATENTS}
    clt = make(CONFIGS["clt"].model_copy(update=of_layer))
    with torch.no_grad():
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            clt.get_parameter(name).copy_(topk.get_parameter(name))
        clt.b_enc.sub_(topk.W_enc @ topk.b_dec)
    x = rows()
    for dead in (None, some_dead()):
        terms, expected = (sae.objective(sae_rows(x), step(dead)).terms for sae in (clt, topk))
        for value, wanted in zip(terms, expected, strict=True):
            assert relative_error(value, wanted) <= 1e-9


def test_sites_that_are_read_and_written_may_differ_in_width() -> None:
    """A CLT can read 3 layers of width 6 and write 3 layers of width 5."""
    config = CLTConfig(n_latents=36, k=4, auxk=5, reads=LAYERS[:3], writes=sites("mlp_out", 3))
    sae: Dictionary = build_sae(config, Widths((6,) * 3, (5,) * 3), dtype=torch.float64)
    sae.product_dtype = torch.float64
    assert sae.W_enc.shape == (36, 6)
    # only pairs in which the written layer is not before the read layer
    assert sae.W_dec.numel() == 12 * (3 + 2 + 1) * 5
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x, y = (torch.randn(20, d, generator=generator).double() for d in (18, 15))
    error = sae.objective(Rows(x, y), step(torch.zeros(36).bool())).error
    full = across_layers(dict(sae.named_parameters()), 3)
    z = (x @ full["W_enc"].T + full["b_enc"]).relu()
    acts = z * (z >= z.flatten().topk(80).values[-1])
    torch.testing.assert_close(error, (y - acts @ full["W_dec"] - full["b_dec"]).detach())


@pytest.mark.parametrize("kind", ["clt", "clt_jumprelu"])
def test_a_layer_is_reconstructed_from_itself_and_earlier_ones(kind: str) -> None:
    sae, x = make(CONFIGS[kind]), rows()
    sae.objective(sae_rows(x), step())  # sets the threshold for inference
    before, changed = sae.infer(x).x_hat, x.clone()
    changed[:, 2 * D : 3 * D] *= -3
    after = sae.infer(changed).x_hat
    moved = (after - before).view(BATCH, len(LAYERS), D).abs().amax((0, 2)) > 1e-9
    assert moved.tolist() == [False, False, True, True]


@pytest.mark.parametrize("among", [None, torch.tensor([0, 1, 3, 4, 7, 9, 10, 11, 13, 30])])
def test_the_product_meets_each_latent_with_its_layer(
    among: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "CHUNK_LATENTS", 4)
    monkeypatch.setattr(select, "CHUNK_BYTES", 8 * 4 * 5)  # blocks of 5 rows
    generator = torch.Generator().manual_seed(0)
    x, W_enc = (torch.randn(n, d, generator=generator).double() for n, d in ((12, 9), (33, 3)))
    full = torch.zeros(33, 3, 3).double()
    for layer in range(3):
        full[layer::3, layer] = W_enc[layer::3]
    found, opened, lowest = torch.full((12, 33), torch.nan).double(), list[int](), 0
    for block in select.products(x, W_enc, torch.float64, among, layers=3):
        if block.starts_new_range:
            lowest = max(opened, default=-1) + 1
        opened += block.latents.tolist()
        # each chunk's latents come after the previous chunk's
        assert int(block.latents.min()) >= lowest
        assert (block.latents.diff() > 0).all()
        found[block.rows, block.latents] = block.products
    met = torch.arange(33) if among is None else among
    torch.testing.assert_close(found[:, met], (x @ full.flatten(1).T)[:, met])
    assert int(found.isfinite().sum()) == 12 * len(met)


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_of_equal_pre_activations_the_lower_latent_is_kept_whatever_its_layer(kernels: str) -> None:
    x, W_enc = torch.ones(3, 4), torch.ones(4 * 80, 1)
    blocks = select.products(x, W_enc, torch.float32, layers=4)
    chosen = choose_kernels(kernels, x.device)  # type: ignore[arg-type]
    keys = select.topk_keys(blocks, 3, torch.zeros(4 * 80), 10, chosen)
    _, entries = select.entries_of(keys, keys.amin(1), 0, 4 * 80)
    assert entries.latents.view(3, 10).sort(1).values.tolist() == [list(range(10))] * 3


def test_it_begins_with_the_centre_and_no_decoder() -> None:
    x = rows(torch.float32, 256) + 2
    sae = make(CONFIGS["clt"], torch.float32)
    sae.initialise(Rows(x, 3 * x), seed=0)
    torch.testing.assert_close(sae.b_dec.detach(), geometric_median(3 * x, WHOLE))
    assert not sae.W_dec.any()
    full = across_layers(dict(sae.named_parameters()), len(LAYERS))
    pre_acts = x @ full["W_enc"].T + full["b_enc"]
    torch.testing.assert_close(pre_acts.mean(0), torch.zeros(N_LATENTS), atol=1e-5, rtol=0)
    torch.testing.assert_close(sae.W_enc.norm(dim=1), torch.ones(N_LATENTS))


@pytest.mark.parametrize("kind", ["clt", "clt_jumprelu"])
def test_a_stuck_latent_fires_again(kind: str) -> None:
    sae, x = make(CONFIGS[kind], torch.float32), rows(torch.float32, 400)
    sae.objective(sae_rows(x), step())
    stuck = torch.arange(N_LATENTS) % 7 == 3
    with torch.no_grad():
        sae.b_enc[stuck] = -50.0
    before = sae.b_enc.detach().clone()
    assert not sae.infer(x).firings[stuck].any()
    sae.revive(stuck, x, x)
    assert set(sae.infer(x).firings[stuck].tolist()) <= {1, 2}
    assert torch.equal(sae.b_enc[~stuck], before[~stuck])


@pytest.mark.parametrize(
    ("reads", "writes", "message"),
    [
        ((4, 4, 4), (4, 4), "sae.writes: a cross-layer transcoder of 3 layers needs 3 sites"),
        ((4, 8, 4), (4, 4, 4), "sae.reads: .* got widths 4, 8, 4"),
        ((4, 4), (3, 3), "sae.writes: the sites have width 3; with an even number of layers"),
    ],
)
def test_widths_that_do_not_fit_are_one_clear_line(
    reads: tuple[int, ...], writes: tuple[int, ...], message: str
) -> None:
    config = CLTConfig(n_latents=12, k=2, auxk=2, reads=LAYERS[: len(reads)])
    with pytest.raises(ConfigError, match=message):
        build_sae(config, Widths(reads, writes))


@pytest.mark.parametrize(
    ("reads", "writes", "message"),
    [
        (sites("mlp_in", 3), sites("mlp_out", 2), "3 sites are read and 2 written"),
        (
            ("mlp_in.0", "mlp_in.2", "mlp_in.1"),
            sites("mlp_out", 3),
            "mlp_in.0, mlp_in.2, mlp_in.1: ",
        ),
        (sites("mlp_in", 2), ("mlp_out.1", "mlp_out.1"), "name each layer once, in the order"),
        (sites("mlp_in", 3), sites("mlp_out", 3), None),
    ],
)
def test_sites_that_do_not_fit_are_one_clear_line(
    reads: tuple[str, ...], writes: tuple[str, ...], message: str | None
) -> None:
    config = CLTConfig(n_latents=12, k=2, auxk=2, reads=reads, writes=writes)
    problem = config.sites_problem(reads, writes)
    assert problem is None if message is None else re.search(re.escape(message), problem or "")


def test_latents_are_a_multiple_of_the_layers() -> None:
    with pytest.raises(
        ValueError, match=r"n_latents \(10\) is not a multiple of the number of reads \(4\)"
    ):
        CLTConfig(n_latents=10, k=2, auxk=2, reads=LAYERS)
    config = CLTConfig(n_latents=24, k=2, auxk=2, reads=LAYERS)
    assert [n for n in range(1, 25) if config.can_shard_over(n)] == [1, 2, 3, 6]
    key, problem = config.shards_problem(4) or ("", "")
    assert key == "n_latents"
    assert problem.startswith(
        "24 is not a multiple of processes.latent_shards (4) times the number"
    )
    assert config.parent_problem({"n_latents": 24}) is None
    assert config.parent_problem({"n_latents": 12}) == (
        "kind: cross-layer transcoders cannot be widened; train from scratch"
    )


class TwoLayers:
    """Two layers: half of the features start in layer 0 and write both; half are in layer 1 only.

    x^0 = sum a_i u_i,  x^1 = sum b_j v_j,  y^0 = sum a_i p_i,  y^1 = sum a_i q_i + sum b_j r_j

    Args:
        shuffled: Whether to permute the rows of layer 1, so that no computation spans the layers.
    """

    d = 32
    """Width of each site."""
    widths = Widths((d, d), (d, d))
    n_features = 12
    """Number of features per layer."""

    def __init__(self, *, shuffled: bool = False) -> None:
        generator = torch.Generator().manual_seed(3)
        shape = (5, self.n_features, self.d)
        directions = torch.randn(shape, generator=generator)
        self.directions = directions / directions.norm(dim=2, keepdim=True)
        self._shuffled = shuffled

    def batch(self, number: int, rows: int) -> Rows:
        generator = torch.Generator().manual_seed(number)
        shape = (rows, 2 * self.n_features)
        on = torch.rand(shape, generator=generator) < 1.5 / self.n_features
        strengths = 1 + 0.25 * torch.randn(shape, generator=generator)
        a, b = (on * strengths.clamp_min(0.1)).chunk(2, 1)
        u, v, p, q, r = self.directions
        scale = (self.d / (1.5 * 1.0625)) ** 0.5
        x = [scale * (a @ u), scale * (b @ v)]
        y = [scale * (a @ p), scale / 2**0.5 * (a @ q + b @ r)]
        if self._shuffled:
            order = torch.randperm(rows, generator=generator)
            x[1], y[1] = x[1][order], y[1][order]
        return Rows(torch.cat(x, 1), torch.cat(y, 1))


class Found(NamedTuple):
    """Share of features, by kind, for which a latent of their layer writes at a cosine above .9."""

    across: float
    own: float


def found_in(world: TwoLayers, sae: Dictionary) -> Found:
    _, _, p, q, r = world.directions
    decoder = across_layers({n: w.detach() for n, w in sae.named_parameters()}, 2)["W_dec"]
    shares = []
    for layer, written in ((0, torch.cat([p, q / 2**0.5], 1)), (1, r)):
        of_layer = decoder[layer::2][:, layer * world.d :]
        cosines = normalize(of_layer) @ normalize(written).T
        shares.append(float((cosines.amax(0) > 0.9).float().mean()))
    return Found(*shares)


WINDOW = 10_000
PLANTED: dict[str, DictionaryConfig] = {
    "clt": CLTConfig(n_latents=32, k=3, auxk=8, dead_after_rows=WINDOW, reads=LAYERS[:2]),
    "clt_jumprelu": CLTJumpReLUConfig(
        n_latents=32, sparsity=0.03, dead_after_rows=WINDOW, reads=LAYERS[:2]
    ),
}


@pytest.mark.system
@pytest.mark.parametrize(("kind", "steps"), [("clt", 200), ("clt_jumprelu", 400)])
def test_a_computation_over_two_layers_is_found_in_its_layers(kind: str, steps: int) -> None:
    trained = train(TwoLayers(), PLANTED[kind], steps=steps, batch=256, lr=5e-3)
    assert min(found_in(TwoLayers(), trained.sae)) >= 0.95
    # one latent per feature, not one per feature and layer
    assert trained.l0[-1] == pytest.approx(3, abs=0.6)


def test_nothing_is_found_across_layers_whose_rows_are_shuffled() -> None:
    world = TwoLayers(shuffled=True)
    found = found_in(world, train(world, PLANTED["clt"], steps=200, batch=256, lr=5e-3).sae)
    assert found.across == 0
    assert found.own >= 0.9
