"""Routed dictionaries: which rows go where, and that sharding changes only the cost."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dist_sae.config.sae import RoutedConfig, TopKConfig
from dist_sae.dictionaries import build_sae
from dist_sae.dictionaries.axis import WHOLE, LatentAxis
from dist_sae.dictionaries.interface import Output
from dist_sae.dictionaries.recipes.routed import Routed
from tests.dictionaries.ranks import on_ranks
from tests.dictionaries.recipes import (
    AUXK,
    BATCH,
    CONFIGS,
    D_IN,
    N_LATENTS,
    K,
    along_rows,
    gradients,
    make,
    oracle,
    relative_error,
    rows,
    sae_rows,
    some_dead,
    step,
)

E, WIDTH = 4, N_LATENTS // 4


def routed(axis: LatentAxis = WHOLE, **settings: object) -> Routed:
    config = CONFIGS["routed"].model_copy(update={"experts_per_row": 1, "k": K} | settings)
    sae = make(config, axis=axis)
    assert isinstance(sae, Routed)
    return sae


def send_all_to(sae: Routed, expert: int) -> None:
    with torch.no_grad():
        sae.W_router.zero_()
        sae.b_router.zero_()
        sae.b_router[expert] = 50.0


@pytest.mark.parametrize(("selection", "kind"), [("row", "topk"), ("batch", "batchtopk")])
@pytest.mark.parametrize("dead", [None, some_dead()], ids=["alive", "some dead"])
def test_one_expert_is_an_exact_dictionary(dead: Tensor | None, selection: str, kind: str) -> None:
    one = routed(experts=1, selection=selection)
    topk = make(CONFIGS[kind])
    topk.load_state_dict(one.state_dict(), strict=False)
    now = step(dead)
    found, expected = one.objective(sae_rows(rows()), now), topk.objective(sae_rows(rows()), now)
    for value, wanted in zip(found.terms, expected.terms, strict=True):
        assert relative_error(value, wanted) <= 1e-12
    theirs = gradients(topk, expected.terms.total)
    ours = gradients(one, found.terms.total)
    for name, gradient in theirs.items():
        assert relative_error(ours[name], gradient) <= 1e-12, name
    assert not ours["W_router"].any()
    assert torch.equal(found.fired, expected.fired)
    assert torch.equal(
        one.decode(one.encode(rows()), rows()), topk.decode(topk.encode(rows()), rows())
    )
    one.revive(some_dead(), rows(), rows() / 3)
    topk.revive(some_dead(), rows(), rows() / 3)
    for name, parameter in topk.named_parameters():
        torch.testing.assert_close(one.get_parameter(name), parameter, rtol=1e-12, atol=0)


def test_a_row_meets_its_expert_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pre-activations are computed only for a row's own expert, which is what routing saves."""
    sae, computed = routed(), []
    keep_largest = sae.kernels.keep_largest

    def counted(best: Tensor, products: Tensor, bias: Tensor, latents: Tensor) -> Tensor:
        computed.append(products.numel())
        return keep_largest(best, products, bias, latents)

    sae.kernels = sae.kernels._replace(keep_largest=counted)
    output = sae.objective(sae_rows(rows()), step())
    assert output.routing is not None
    assert int(output.routing.load.sum()) == BATCH
    assert (output.routing.load > 0).sum() > 1
    assert sum(computed) == BATCH * WIDTH
    codes = sae.encode(rows())
    experts = sae.route(rows() - sae.b_dec).experts[:, 0]
    ends = [*codes.starts[1:].tolist(), len(codes.latents)]
    for row, (start, end) in enumerate(zip(codes.starts.tolist(), ends, strict=True)):
        assert end - start == K
        assert (codes.latents[start:end] // WIDTH == experts[row]).all()


@pytest.mark.parametrize("per_row", [1, 2])
@pytest.mark.parametrize("gate", ["straight_through", "probability"])
@pytest.mark.parametrize("selection", ["row", "batch"])
def test_gates_and_selections_equal_the_dense_reference(
    selection: str, gate: str, per_row: int
) -> None:
    sae = routed(selection=selection, gate=gate, experts_per_row=per_row, k=per_row * K)
    x = rows()
    now = step(some_dead())
    ours, theirs = sae.objective(sae_rows(x), now).terms.total, oracle(sae, x, now).total
    assert relative_error(ours, theirs) <= 1e-12
    found, expected = gradients(sae, ours), gradients(sae, theirs)
    expected["W_dec"] -= along_rows(expected["W_dec"], sae.W_dec.detach())
    for name, gradient in found.items():
        assert gradient.norm() > 0, name
        assert relative_error(gradient, expected[name]) <= 1e-9, name


@pytest.mark.parametrize("per_row", [1, 2])
def test_what_is_trained_is_what_is_used(per_row: int) -> None:
    """`encode` and `decode` give the reconstruction that the training loss is computed from."""
    sae = routed(experts_per_row=per_row, k=per_row * K)
    error = rows() - sae.decode(sae.encode(rows()), rows())
    torch.testing.assert_close(sae.objective(sae_rows(rows()), step()).error, error)


@pytest.mark.parametrize("per_row", [1, 2])
def test_a_batch_selection_uses_what_lies_above_the_threshold(per_row: int) -> None:
    """At inference, a batch selection keeps a row's codes above the threshold in its experts."""
    sae = routed(experts_per_row=per_row, selection="batch", k=3)
    now = step()
    kept = sum(float(sae.objective(sae_rows(rows()), now).active) for _ in range(2))
    assert kept == 2 * 3 * BATCH
    x = rows()
    pre_acts = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    route = sae.route(x - sae.b_dec)
    met = x.new_zeros(BATCH, E).scatter(1, route.experts, route.gates).repeat_interleave(WIDTH, 1)
    thresholds = sae.inference_thresholds()
    assert thresholds is not None
    expected = pre_acts.where(pre_acts > thresholds, 0) * met
    assert 0 < (expected > 0).sum() < BATCH * WIDTH / 2
    codes = sae.encode(x)
    found = torch.zeros_like(expected)
    ends = torch.cat([codes.starts[1:], torch.tensor([len(codes.latents)])])
    found[torch.arange(BATCH).repeat_interleave(ends - codes.starts), codes.latents] = codes.acts
    torch.testing.assert_close(found, expected.detach())


@pytest.mark.parametrize(("replicas", "shards"), [(1, 2), (1, 4), (2, 2)])
@pytest.mark.parametrize(
    "case", ["even", "one expert", "r = 2", "capacity", "batch", "batch, one expert"]
)
def test_experts_on_several_ranks_give_what_one_rank_gives(
    replicas: int, shards: int, case: str
) -> None:
    """Experts on several ranks give one rank's results, also if a rank's experts get no rows."""
    settings: dict[str, dict[str, object]] = {
        "r = 2": {"experts_per_row": 2, "k": 2 * K},
        "capacity": {"capacity": 1.0},
        "batch": {"experts_per_row": 2, "selection": "batch"},
        "batch, one expert": {"selection": "batch"},
    }

    def run(axis: LatentAxis) -> tuple[Output, Tensor]:
        sae = routed(axis, **settings.get(case, {}))
        if "one expert" in case:
            send_all_to(sae, 1)
        dead = some_dead()[sae.first_latent :][: len(sae.W_enc)]
        n = BATCH // (axis.replicas * axis.shards)
        number = axis.replica * axis.shards + axis.shard
        own = rows()[number * n : (number + 1) * n]
        now = step(some_dead())._replace(dead=dead)
        return sae.objective(sae_rows(own), now), sae.decode(sae.encode(own), own)

    whole, x_hat = run(WHOLE)
    parts = on_ranks(replicas, shards, run)
    assert whole.routing is not None
    for output, _ in parts:
        assert output.routing is not None
        assert torch.equal(output.routing.load, whole.routing.load)
    dropped = sum(output.routing.dropped for output, _ in parts if output.routing)
    assert (dropped > 0) == (case == "capacity")
    if case == "capacity" and replicas > 1:
        return  # capacity is computed from a replica's share of the batch
    assert dropped == whole.routing.dropped
    for name, wanted in whole.terms._asdict().items():
        found = sum(getattr(output.terms, name) for output, _ in parts) / replicas
        assert relative_error(found, wanted) <= 1e-12, name
    assert torch.cat([part for _, part in parts]).allclose(x_hat, atol=1e-12)
    assert torch.cat([output.error for output, _ in parts]).allclose(whole.error, atol=1e-12)
    fired = [output.fired for output, _ in parts]
    for shard in range(shards):
        hit = torch.stack(fired[shard::shards]).any(0)
        assert torch.equal(hit, whole.fired.chunk(shards)[shard])


def test_an_expert_over_capacity_drops_its_last_rows_and_counts_them() -> None:
    sae = routed(capacity=1.0)
    send_all_to(sae, 2)
    output = sae.objective(sae_rows(rows()), step())
    assert output.routing is not None
    assert output.routing.load.tolist() == [0, 0, BATCH, 0]
    assert output.routing.dropped == BATCH - BATCH // E
    x = rows()
    assert torch.equal(output.error[BATCH // E :], (x - sae.b_dec)[BATCH // E :])
    assert not torch.equal(output.error[: BATCH // E], (x - sae.b_dec)[: BATCH // E])


def test_the_balance_term_is_nothing_when_all_are_equally_busy() -> None:
    """The balance loss is 0 under equal load; its gradient moves rows off busy experts."""
    sae = routed(balance_coefficient=0.5)
    with torch.no_grad():
        sae.W_router.zero_()
        sae.b_router.zero_()
    x = rows()
    assert sae.objective(sae_rows(x), step()).terms.sparsity.item() == pytest.approx(0, abs=1e-12)
    with torch.no_grad():
        sae.b_router[1] = 1.0
    terms = sae.objective(sae_rows(x), step()).terms
    p = sae.b_router.softmax(0)[1]
    assert terms.sparsity.item() == pytest.approx(0.5 * (E * p.item() - 1))
    gradient = gradients(sae, terms.sparsity)["b_router"]
    assert gradient[1] > 0 > gradient[0]


def test_balancing_by_bias_moves_rows_without_a_loss() -> None:
    sae = routed(balance="bias", balance_rate=0.02)
    with torch.no_grad():
        sae.b_router[0] = 2.0
    loads = []
    for _ in range(100):
        output = sae.objective(sae_rows(rows(batch=512)), step())
        assert output.routing is not None
        assert output.terms.sparsity.item() == 0
        loads.append(output.routing.load)
    assert loads[0].max() > 1.5 * 512 / E
    assert loads[-1].max() < 1.15 * 512 / E
    sae.eval()
    before = sae.balance.clone()
    sae.objective(sae_rows(rows()), step())
    assert torch.equal(sae.balance, before)


def test_a_bias_may_send_a_row_where_p_is_nothing() -> None:
    """A balancing bias may route a row to an expert whose probability underflows to 0.

    exp(-200) is 0 in fp32. The gate must still be 1 and the gradients finite.
    """
    config = RoutedConfig(n_latents=N_LATENTS, experts=E, k=K, auxk=AUXK, balance="bias")
    sae = make(config, torch.float32)
    assert isinstance(sae, Routed)
    with torch.no_grad():
        sae.W_router.zero_()
        sae.b_router.copy_(torch.tensor([0.0, -200.0, -200.0, -200.0]))
        sae.balance[1] = 300.0
    output = sae.objective(sae_rows(rows(torch.float32)), step())
    assert output.routing is not None
    assert output.routing.load.tolist() == [0, BATCH, 0, 0]
    for name, gradient in gradients(sae, output.terms.total).items():
        assert gradient.isfinite().all(), name
    assert gradients(sae, sae.objective(sae_rows(rows(torch.float32)), step()).terms.fvu)[
        "b_router"
    ].any()


def test_the_first_batch_is_spread_evenly_whatever_the_data() -> None:
    """Initial routing is balanced even if rows have a huge coordinate, as language models do."""
    x = rows(torch.float32, 512)
    x[:, 3] += 40.0 + 10 * x[:, 4]
    config = RoutedConfig(n_latents=N_LATENTS, experts=E, k=K, auxk=AUXK)
    sae = build_sae(config, D_IN)
    sae.initialise(sae_rows(x), 0)
    output = sae.objective(sae_rows(x), step())
    assert output.routing is not None
    assert output.routing.load.max() <= 1.1 * 512 / E


def test_directions_come_from_rows_that_come_to_the_expert() -> None:
    config = RoutedConfig(n_latents=N_LATENTS, experts=E, k=K, auxk=AUXK)
    sae = build_sae(config, D_IN)
    assert isinstance(sae, Routed)
    x = rows(torch.float32, 96)
    sae.initialise(sae_rows(x), 0)
    centred = (x - sae.b_dec).detach()
    experts = sae.route(centred).experts[:, 0]
    assign = sae.row_assigner(0)
    places = torch.cat([assign(x[:50]), assign(x[50:])])
    taken = places[places < N_LATENTS]
    assert len(set(taken.tolist())) == len(taken)
    for expert in range(E):
        mine = places[experts == expert]
        expected = torch.arange(len(mine)) + expert * WIDTH
        expected[WIDTH:] = N_LATENTS  # a full expert takes no more rows
        assert torch.equal(mine, expected)


def test_auxk_teaches_the_router_nothing() -> None:
    sae = routed()
    terms = sae.objective(sae_rows(rows()), step(some_dead())).terms
    found = gradients(sae, terms.auxk)
    assert found["W_enc"][some_dead()].any()
    assert not found["W_router"].any()


@pytest.mark.parametrize(
    "update",
    [lambda s: s.__setitem__("W_router", s["W_router"] * torch.nan)],
    ids=["NaN in the router"],
)
def test_a_router_that_is_not_finite_makes_the_gradient_so(
    update: Callable[[dict[str, Tensor]], None],
) -> None:
    """NaN in the router reaches the gradient, so the run stops before the update."""
    sae = routed()
    state = sae.state_dict()
    update(state)
    sae.load_state_dict(state)
    found = gradients(sae, sae.objective(sae_rows(rows()), step()).terms.total)
    assert not all(gradient.isfinite().all() for gradient in found.values())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_latents": 65}, r"n_latents \(65\) is not a multiple of experts \(4\)"),
        ({"k": 20}, r"k \(20\) must not exceed the 16 latents of a row's experts"),
        ({"k": 20, "selection": "batch"}, r"k \(20\) must not exceed the 16 latents"),
        ({"experts_per_row": 5, "k": 5}, r"experts_per_row \(5\) must not exceed experts \(4\)"),
        ({"experts_per_row": 2}, r"k \(5\) is not a multiple of experts_per_row \(2\)"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, int], words: str) -> None:
    whole = {"n_latents": N_LATENTS, "experts": E, "k": K, "auxk": AUXK} | settings
    with pytest.raises(ValueError, match=words):
        RoutedConfig.model_validate(whole)
    assert TopKConfig.model_validate({"n_latents": 65, "k": 5, "auxk": 0})
