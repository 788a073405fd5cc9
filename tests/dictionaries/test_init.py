"""Initial dictionaries: their values, and that each shard starts with its part of the same one."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dist_sae.config.sae import (
    BatchTopKConfig,
    RoutedConfig,
    TopKConfig,
)
from dist_sae.dictionaries import build_sae
from dist_sae.dictionaries.axis import WHOLE, LatentAxis
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.init import (
    first_rows,
    geometric_median,
    initialise_from_data,
    random_rows,
)
from dist_sae.dictionaries.interface import StepContext
from tests.dictionaries.ranks import ThreadAxis, on_ranks
from tests.dictionaries.recipes import (
    CONFIGS,
    D_IN,
    KINDS,
    N_LATENTS,
    PENALISED,
    SHARED,
    make,
    sae_rows,
    widths,
)

WIDENED = tuple(
    kind for kind in KINDS if kind not in ("routed", "transcoder", "clt", "clt_jumprelu")
)
LAYOUTS = [(1, 2), (2, 1), (2, 2), (1, 4)]  # replicas x shards
BATCH = 24


def batch(number: int, rows: int = BATCH) -> Tensor:
    generator = torch.Generator().manual_seed(100 + number)
    return 1 + torch.randn(rows, D_IN, generator=generator)


def part(axis: LatentAxis, x: Tensor) -> Tensor:
    """Return this rank's rows of a global batch."""
    return x.chunk(axis.replicas * axis.shards)[axis.replica * axis.shards + axis.shard]


def parameters(sae: Dictionary) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in sae.named_parameters()}


def check_shards(ranks: list[dict[str, Tensor]], whole: dict[str, Tensor], shards: int) -> None:
    """Check that shards match the whole up to fp32 rounding, since ranks sum in another order."""
    for number, found in enumerate(ranks):
        for name, tensor in whole.items():
            expected = tensor if name in SHARED else tensor.chunk(shards)[number % shards]
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)


def test_random_rows_of_a_shard_are_those_of_the_whole() -> None:
    """A shard's random rows are a slice of the whole's, also across block boundaries.

    3,000 rows are two full blocks of random numbers and one partial block.
    """
    whole = torch.empty(3000, 4)
    random_rows(whole, 7, 0)
    assert len(torch.unique(whole, dim=0)) == 3000  # no two blocks are equal
    for first, stop in ((0, 1500), (1500, 3000), (1000, 1050), (1023, 1025), (2048, 3000)):
        shard = torch.full((stop - first, 4), torch.nan)
        random_rows(shard, 7, first)
        assert torch.equal(shard, whole[first:stop])
    assert float(whole.square().mean()) == pytest.approx(1, abs=0.05)
    assert float(whole.mean()) == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("seeds", [(0, 1), (3, 4), (0, 2**32 - 1), (1, 1000)])
def test_another_seed_gives_other_directions(seeds: tuple[int, int]) -> None:
    """No block of random rows under one seed repeats any block under another seed."""
    found = []
    for seed in seeds:
        W = torch.empty(8 * 1024, 2)
        random_rows(W, seed, 0)
        found.append(W)
    assert len(torch.unique(torch.cat(found), dim=0)) == 2 * 8 * 1024


@pytest.mark.parametrize(("replicas", "shards"), LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_shards_begin_as_parts_of_the_same_dictionary(
    kind: str, replicas: int, shards: int
) -> None:
    config = CONFIGS[kind]

    def initialised(axis: LatentAxis) -> dict[str, Tensor]:
        sae: Dictionary = build_sae(config, widths(config), axis)  # type: ignore[arg-type]
        sae.initialise(sae_rows(part(axis, batch(0))), seed=5)
        return parameters(sae)

    whole = initialised(WHOLE)
    assert all(tensor.isfinite().all() for tensor in whole.values())
    check_shards(on_ranks(replicas, shards, initialised), whole, shards)


def from_data(axis: LatentAxis, kind: str = "topk") -> dict[str, Tensor]:
    """Initialize 64 latents from 72 rows."""
    sae = build_sae(CONFIGS[kind], widths(CONFIGS[kind]), axis)  # type: ignore[arg-type]
    rows = [part(axis, batch(number)) for number in range(3)]
    sae.initialise(sae_rows(rows[0]), seed=5)
    initialise_from_data(sae, map(sae_rows, rows))
    return parameters(sae)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "clt" not in kind])
def test_directions_from_data_begin_anew_with_their_length(kind: str) -> None:
    """`initialise_from_data` does not depend on the length computed by `initialise`.

    So training skips that first computation, which multiplies all rows by all latents.
    """
    found = []
    for rescale in (True, False):
        sae = build_sae(CONFIGS[kind], widths(CONFIGS[kind]))  # type: ignore[arg-type]
        sae.initialise(sae_rows(batch(0)), seed=5, rescale=rescale)
        initialise_from_data(sae, [sae_rows(batch(number)) for number in range(3)])
        found.append(dict(sae.tensors()))
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor), name


def test_directions_from_data_are_near_those_of_the_first_rows() -> None:
    found = from_data(WHOLE)
    torch.testing.assert_close(found["b_dec"], geometric_median(batch(0), WHOLE))
    rows = torch.cat([batch(number) for number in range(3)])[:N_LATENTS] - found["b_dec"]
    random = torch.empty(N_LATENTS, D_IN)
    random_rows(random, 5, 0)
    mixed = 0.8 * rows / rows.norm(dim=1, keepdim=True)
    mixed += 0.6 * random / random.norm(dim=1, keepdim=True)
    expected = mixed / mixed.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found["W_dec"], expected)
    # the encoder is tied to the decoder, scaled by one common factor
    factors = found["W_enc"].norm(dim=1)
    torch.testing.assert_close(factors, factors[:1].expand(N_LATENTS))
    torch.testing.assert_close(found["W_enc"], factors[0] * expected)
    assert not found["b_enc"].any()


def test_latents_from_equal_rows_are_no_copies() -> None:
    """Latents that start from nearly parallel rows still differ.

    Rows with one very large coordinate all point the same way, and identical latents would die
    together.
    """
    sae = build_sae(TopKConfig(n_latents=48, k=4, auxk=0), D_IN)
    rows = batch(0, 48)
    sae.initialise(sae_rows(rows), seed=5)
    rows[:, 3] += 1e4
    initialise_from_data(sae, [sae_rows(rows)])
    cosines = (sae.W_dec @ sae.W_dec.T).detach()
    assert cosines[~torch.eye(48, dtype=torch.bool)].mean() == pytest.approx(0.8**2, abs=0.05)


def unlike(rows: Tensor, bound: float) -> list[int]:
    """Return the indices of rows whose cosine with every earlier chosen row is below the bound."""
    chosen: list[int] = []
    for number, row in enumerate(normalize(rows.double())):
        if all(float(row @ normalize(rows[n].double(), dim=0)) < bound for n in chosen):
            chosen.append(number)
    return chosen


@pytest.mark.parametrize("kind", ["relu", "gated"])
def test_a_row_that_is_like_one_before_it_gives_no_direction(kind: str) -> None:
    """With an L1 penalty, a row close to an earlier one is skipped.

    Latents that get no row keep their random directions.
    """
    found = from_data(WHOLE, kind)
    rows = torch.cat([batch(number) for number in range(3)])[:N_LATENTS] - found["b_dec"]
    random = torch.empty(N_LATENTS, D_IN)
    random_rows(random, 5, 0)
    chosen = torch.zeros(N_LATENTS, dtype=torch.bool)
    chosen[unlike(rows, 0.5)] = True
    assert 16 <= chosen.sum() <= 48
    mixed = 0.8 * normalize(rows) * chosen[:, None] + 0.6 * normalize(random)
    torch.testing.assert_close(normalize(found["W_enc"]), normalize(mixed))


@pytest.mark.parametrize(("replicas", "shards"), LAYOUTS)
@pytest.mark.parametrize("kind", ["topk", "routed", "relu"])
def test_directions_from_data_are_the_same_for_shards(
    kind: str, replicas: int, shards: int
) -> None:
    ranks = on_ranks(replicas, shards, lambda axis: from_data(axis, kind))
    check_shards(ranks, from_data(WHOLE, kind), shards)


KNOWN = 24


def widened(kind: str, axis: LatentAxis) -> dict[str, Tensor]:
    """Widen a dictionary of 24 known latents by 40 new ones, initialized from 48 rows."""
    narrow = make(CONFIGS[kind], torch.float32)
    sae: Dictionary = build_sae(CONFIGS[kind], widths(CONFIGS[kind]), axis)  # type: ignore[arg-type]
    rows = [part(axis, batch(number)) for number in range(2)]
    sae.initialise(sae_rows(rows[0]), seed=5)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            values = dict(narrow.named_parameters())[name]
            n = min(max(KNOWN - sae.first_latent, 0), len(sae.W_enc))
            known = slice(sae.first_latent, sae.first_latent + n)
            if name == "b_dec":
                parameter.copy_(values)
            else:
                parameter[:n] = values[known]
    if kind in ("batchtopk", "matryoshka"):
        sae.get_buffer("threshold").copy_(torch.tensor([0.3, 1.0]))
    initialise_from_data(sae, map(sae_rows, rows), KNOWN)
    return parameters(sae)


@pytest.mark.parametrize("kind", [kind for kind in WIDENED if not CONFIGS[kind].reads])
def test_new_latents_point_at_what_the_known_ones_leave(kind: str) -> None:
    found, narrow = widened(kind, WHOLE), make(CONFIGS[kind], torch.float32)
    known = {name: p.detach()[:KNOWN] for name, p in narrow.named_parameters() if name != "b_dec"}
    for name, values in known.items():
        assert torch.equal(found[name][:KNOWN], values)
    alone = CONFIGS[kind].model_copy(update={"n_latents": KNOWN})
    sae: Dictionary = build_sae(alone, D_IN)  # type: ignore[arg-type]
    sae.load_state_dict({**known, "b_dec": narrow.b_dec}, strict=False)
    if kind in ("batchtopk", "matryoshka"):
        sae.get_buffer("threshold").copy_(torch.tensor([0.3, 1.0]))
    x = torch.cat([batch(0), batch(1)])
    left = x - sae.decode(sae.encode(x), x)
    random = torch.empty(N_LATENTS, D_IN)
    random_rows(random, 5, 0)
    towards = normalize(left)[: N_LATENTS - KNOWN]
    if kind in ("relu", "gated"):
        chosen = unlike(towards, 0.5)
        towards = torch.zeros_like(towards).index_copy(0, torch.tensor(chosen), towards[chosen])
    expected = 0.8 * towards + 0.6 * normalize(random)[KNOWN:]
    torch.testing.assert_close(normalize(found["W_dec"][KNOWN:]), normalize(expected))
    for name, share in (("W_dec", 1.0), ("W_enc", 0.5)):
        torch.testing.assert_close(normalize(found[name][KNOWN:]), normalize(expected))
        lengths = found[name].norm(dim=1)
        mean = lengths[:KNOWN].mean().expand(N_LATENTS - KNOWN)
        torch.testing.assert_close(lengths[KNOWN:], share * mean)
    settled = {"b_enc"} if kind in PENALISED else set()
    for name in known.keys() - {"W_dec", "W_enc"} - settled:
        mean = known[name].mean().expand(N_LATENTS - KNOWN)
        if name == "b_mag":  # magnitudes are positive wherever gates are open
            mean = torch.maximum(mean, (found["r_mag"].exp() * found["b_enc"])[KNOWN:])
        torch.testing.assert_close(found[name][KNOWN:], mean)


def test_a_buffer_per_latent_gets_the_mean_of_the_known_ones() -> None:
    """New latents get the known latents' mean, on both shards: 11.5 for 0, 1, ..., 23."""

    def on_rank(axis: LatentAxis) -> Tensor:
        sae: Dictionary = build_sae(CONFIGS["topk"], D_IN, axis)  # type: ignore[arg-type]
        numbers = torch.arange(len(sae.W_enc)) + sae.first_latent
        sae.add_tensor("numbers", numbers.float(), per_latent=True)
        rows = [sae_rows(part(axis, batch(number))) for number in range(2)]
        sae.initialise(rows[0], seed=5)
        initialise_from_data(sae, rows, KNOWN)
        return sae.get_buffer("numbers")

    found = torch.cat(on_ranks(1, 2, on_rank))
    assert torch.equal(found[:KNOWN], torch.arange(KNOWN).float())
    assert torch.equal(found[KNOWN:], torch.full((N_LATENTS - KNOWN,), 11.5))


@pytest.mark.parametrize("kind", PENALISED)
def test_new_latents_without_a_count_fire_rarely(kind: str) -> None:
    """New latents of penalized recipes start by firing on .3 % of the rows.

    More would drown out the known latents. A latent that never fires could not learn.
    """
    sae, x = make(CONFIGS[kind], torch.float32), batch(0, 2000)
    before = sae.b_enc.detach().clone()
    sae.adapt_new_latents(slice(KNOWN, None), x)
    counts = torch.bincount(sae.encode(x).latents, minlength=N_LATENTS)
    assert set(counts[KNOWN:].tolist()) <= {6, 7}  # rounding decides about the last row
    assert torch.equal(sae.b_enc[:KNOWN], before[:KNOWN])
    sae.adapt_new_latents(slice(KNOWN, None), x[:20])
    counts = torch.bincount(sae.encode(x[:20]).latents, minlength=N_LATENTS)
    assert set(counts[KNOWN:].tolist()) <= {1, 2}


@pytest.mark.parametrize(("replicas", "shards"), LAYOUTS)
@pytest.mark.parametrize("kind", WIDENED)
def test_shards_are_widened_as_the_whole(kind: str, replicas: int, shards: int) -> None:
    """Widening shard by shard gives the same parameters as widening the whole dictionary.

    With four shards of 16 latents, the first shard has only known latents, the second has both
    kinds, and the others have only new ones.
    """
    ranks = on_ranks(replicas, shards, lambda axis: widened(kind, axis))
    check_shards(ranks, widened(kind, WHOLE), shards)


def begun_again(kind: str, axis: LatentAxis, n_rows: int = BATCH) -> dict[str, Tensor]:
    """Return the parameters after reviving latents 10 to 39 of 64, which never fire."""
    sae = make(CONFIGS[kind], torch.float32, axis)
    here = slice(sae.first_latent, sae.first_latent + len(sae.W_enc))
    stuck = torch.zeros(N_LATENTS, dtype=torch.bool)
    stuck[10:40] = True
    x, error = batch(0, n_rows), batch(1, n_rows) - 1
    with torch.no_grad():
        sae.b_enc[stuck[here]] = -50.0
    sae.revive(stuck[here], part(axis, x), part(axis, error))
    return parameters(sae)


@pytest.mark.parametrize("kind", PENALISED)
def test_stuck_latents_without_a_count_begin_again_where_there_is_error(kind: str) -> None:
    """Stuck latents of penalized recipes restart along the error, one row for each latent.

    The 24 rows serve the first 24 stuck latents. The other stuck latents wait.
    """
    found, before = begun_again(kind, WHOLE), parameters(make(CONFIGS[kind], torch.float32))
    x, error = batch(0), batch(1) - 1
    new, others = slice(10, 34), [*range(10), *range(34, N_LATENTS)]
    for name in ("W_enc", "W_dec", *({"theta"} & before.keys())):
        assert torch.equal(found[name][others], before[name][others]), name
    expected = 0.8 * normalize(error) + 0.6 * normalize(before["W_dec"][new])
    thetas = make(CONFIGS[kind], torch.float32).inference_thresholds()
    assert thetas is not None
    fires = (x @ before["W_enc"].T + before["b_enc"] > thetas).any(0)
    fires[10:40] = False
    # otherwise the average would not show which latents it is taken over
    assert 0 < fires.sum() < len(others)
    for name, share in (("W_dec", 1.0), ("W_enc", 0.5)):
        torch.testing.assert_close(normalize(found[name][new]), normalize(expected))
        length = share * before[name][fires].norm(dim=1).mean()
        torch.testing.assert_close(found[name][new].norm(dim=1), length.expand(24))
    if "theta" in before:
        mean = before["theta"][fires].mean()
        torch.testing.assert_close(found["theta"][new], mean.expand(24))
    sae: Dictionary = build_sae(CONFIGS[kind], D_IN)  # type: ignore[arg-type]
    sae.load_state_dict(found)
    assert set(sae.infer(x).firings[new].tolist()) == {1}
    assert (found["b_enc"][34:40] == -50).all()


@pytest.mark.parametrize(("replicas", "shards"), LAYOUTS)
@pytest.mark.parametrize("kind", PENALISED)
def test_shards_begin_again_as_the_whole(kind: str, replicas: int, shards: int) -> None:
    """Stuck latents on several shards get the same rows as in the whole dictionary."""
    ranks = on_ranks(replicas, shards, lambda axis: begun_again(kind, axis))
    check_shards(ranks, begun_again(kind, WHOLE), shards)


def test_a_dictionary_of_which_all_is_dead_comes_back() -> None:
    sae, x = make(CONFIGS["jumprelu"], torch.float32), batch(0, N_LATENTS)
    with torch.no_grad():
        sae.b_enc.fill_(-50.0)
    sae.revive(torch.ones(N_LATENTS, dtype=torch.bool), x, x - sae.b_dec.detach())
    fired = sae.infer(x).firings
    assert (fired > 0).all()


SELECTS = {
    "topk": TopKConfig(n_latents=48, k=4, k_start=6, auxk=0),
    "batchtopk": BatchTopKConfig(n_latents=48, k=4, k_start=6, auxk=0),
    "routed": RoutedConfig(n_latents=48, k=4, k_start=6, experts=2, selection="batch", auxk=0),
}


@pytest.mark.parametrize("kind", SELECTS)
def test_a_dictionary_starts_at_the_scale_that_suits_what_training_keeps(kind: str) -> None:
    """The encoder's initial scale minimizes the error at k_start = 6 latents per row.

    The batch is the last one, from which the scale was computed.
    """
    sae: Dictionary = build_sae(SELECTS[kind], D_IN)  # type: ignore[arg-type]
    rows = [batch(0), batch(1)]
    sae.initialise(sae_rows(rows[0]), seed=5)
    initialise_from_data(sae, map(sae_rows, rows))
    if kind != "topk":  # rounding decides whether the smallest kept value is above the threshold
        assert len(sae.encode(rows[1]).acts) in (6 * BATCH - 1, 6 * BATCH)

    def fvu(scale: float) -> float:
        before = sae.W_enc.detach().clone()
        with torch.no_grad():
            sae.W_enc.mul_(scale)
            none_dead = torch.zeros(48, dtype=torch.bool)
            found = float(
                sae.objective(sae_rows(rows[1]), StepContext(1.0, none_dead, 0, 0.0)).terms.fvu
            )
            sae.W_enc.copy_(before)
        return found

    assert fvu(1.0) < min(fvu(0.98), fvu(1.02))


@pytest.mark.parametrize("kind", SELECTS)
def test_the_encoder_has_a_gradient_at_the_start_with_one_latent_a_row(kind: str) -> None:
    """The initial encoder has a gradient even if one latent per row is active.

    At the optimal scale the gradient would be 0, and rounding would decide the first steps.
    """
    settings = {"k": 1, "k_start": None, "selection": "row"}
    config, gradients = SELECTS[kind].model_copy(update=settings), []
    for dtype in (torch.float32, torch.float64):
        sae: Dictionary = build_sae(config, D_IN, product_dtype=dtype, dtype=dtype)  # type: ignore[arg-type]
        sae.initialise(sae_rows(batch(0).to(dtype)), seed=5)
        none_dead = torch.zeros(48, dtype=torch.bool)
        sae.objective(
            sae_rows(batch(0).to(dtype)), StepContext(1.0, none_dead, 0, 0.0)
        ).terms.fvu.backward()  # type: ignore[no-untyped-call]
        assert sae.W_enc.grad is not None
        gradients.append(sae.W_enc.grad.double())
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * float(gradients[1].abs().max()))


@pytest.mark.parametrize(("replicas", "shards"), LAYOUTS)
def test_the_first_rows_of_a_batch_are_known_to_all(replicas: int, shards: int) -> None:
    for n in (1, 7, BATCH, 100):
        ranks = on_ranks(
            replicas,
            shards,
            lambda axis, n=n: first_rows(part(axis, batch(0)), n, axis),  # type: ignore[misc]
        )
        for found in ranks:
            assert torch.equal(found, batch(0)[:n])


@pytest.mark.parametrize(("replicas", "shards"), LAYOUTS)
def test_the_geometric_median_is_that_of_all_rows(replicas: int, shards: int) -> None:
    def median(axis: ThreadAxis) -> Tensor:
        return geometric_median(part(axis, batch(0)), axis)

    for found in on_ranks(replicas, shards, median):
        torch.testing.assert_close(found, geometric_median(batch(0), WHOLE))
