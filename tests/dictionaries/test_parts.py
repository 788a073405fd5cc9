"""Small building blocks: schedules, dead counts, initialization and metrics."""

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dist_sae.config.sae import BatchTopKConfig, ReLUConfig, TopKConfig
from dist_sae.dictionaries import build_sae, metrics
from dist_sae.dictionaries.auxk import auxk_loss
from dist_sae.dictionaries.axis import WHOLE
from dist_sae.dictionaries.base import firings
from dist_sae.dictionaries.dead import DeadLatents
from dist_sae.dictionaries.ema import WeightAverage
from dist_sae.dictionaries.init import geometric_median, initialise_tied
from dist_sae.dictionaries.interface import Inferred
from dist_sae.dictionaries.metrics import Fit, ce_recovered, duplicate_shares
from dist_sae.dictionaries.schedules import learning_rate
from dist_sae.dictionaries.selection import BatchTopK
from dist_sae.kernels import Entries
from dist_sae.kernels.torch import KERNELS
from tests.dictionaries.recipes import sae_rows


def test_learning_rate_rises_stays_and_falls() -> None:
    rates = [learning_rate(s, 10, peak=8.0, warmup_steps=4, decay_share=0.2) for s in range(10)]
    # warm-up over 4 steps, constant, and the last 2 steps at 2/2 and 1/2 of the peak
    assert rates == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 4.0]


def test_learning_rate_is_constant_without_warmup_and_decay() -> None:
    assert {learning_rate(s, 5, peak=3.0, warmup_steps=0, decay_share=0.0) for s in range(5)} == {
        3.0
    }


def test_dead_latents_are_counted_in_rows_and_revive() -> None:
    dead = DeadLatents(3, after_rows=20)
    for _ in range(2):
        dead.update(torch.tensor([True, False, False]), rows=10)
    assert dead.mask.tolist() == [False, True, True]
    assert (dead.count, dead.share) == (2, 2 / 3)
    dead.update(torch.tensor([False, True, False]), rows=10)
    assert dead.mask.tolist() == [False, False, True]
    assert dead.idle_rows.tolist() == [10, 0, 30]


def test_a_latent_is_stuck_once_in_every_further_window() -> None:
    """A latent is dead after 20 idle rows, and stuck once in each further window of 20.

    In batches of 8 rows it is stuck at the first step at or after 40, 60, ... rows.
    """
    dead = DeadLatents(2, after_rows=20)
    stuck = []
    for batch in range(1, 10):
        dead.update(torch.tensor([True, False]), rows=8)
        assert dead.n_stuck == int(dead.stuck.sum())
        if dead.stuck[1]:
            stuck.append(8 * batch)
    assert stuck == [40, 64]
    assert not dead.stuck[0]


def test_firings_ignore_latents_selected_at_zero() -> None:
    entries = Entries(torch.tensor([0, 1, 2, 3, 0]), torch.tensor([0, 4]), 5)
    acts = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5])
    assert firings(acts, entries).tolist() == [2, 0, 0, 1, 0]


def test_entries_know_their_rows_and_their_order_by_latent() -> None:
    """Entries of 4 rows, two of them empty, are grouped by row and by latent."""
    entries = Entries(torch.tensor([3, 1, 3, 0, 1]), torch.tensor([0, 2, 2, 5]), 5)
    assert entries.rows.tolist() == [0, 0, 2, 2, 2]
    order, starts = entries.by_latent
    assert entries.latents[order].tolist() == [0, 1, 1, 3, 3]
    assert order.tolist() == [3, 1, 4, 0, 2]  # within a latent, in the order of the rows
    assert starts.tolist() == [0, 1, 3, 3, 5]


def test_geometric_median_is_not_moved_by_an_outlier() -> None:
    """The geometric median of points on a line is their median: 2, where the mean is 202."""
    x = torch.tensor([[0.0], [1.0], [2.0], [3.0], [1004.0]])
    assert float(geometric_median(x, WHOLE)) == pytest.approx(2.0, abs=1e-3)


def test_initial_reconstruction_has_the_scale_of_least_squared_error() -> None:
    """At the initial scale, the error is least: it is orthogonal to the reconstruction."""
    x = 3 * torch.randn(256, 24, generator=torch.Generator().manual_seed(0)) + 1
    sae = build_sae(TopKConfig(n_latents=96, k=8, auxk=0), 24)
    initialise_tied(sae, sae_rows(x), seed=5)
    centre = sae.b_dec.detach()
    rebuilt = sae.decode(sae.encode(x), x) - centre
    error = x - centre - rebuilt
    assert float((error * rebuilt).sum()) == pytest.approx(0.0, abs=1e-5 * float(x.square().sum()))
    torch.testing.assert_close(sae.W_dec.detach().norm(dim=1), torch.ones(96))
    cosines = torch.cosine_similarity(sae.W_enc, sae.W_dec)
    torch.testing.assert_close(cosines.detach(), torch.ones(96))


def test_the_running_mean_forgets_its_start_and_follows_the_weights() -> None:
    """The running mean matches values worked out by hand.

    It starts as the weights, then moves 9/10, 9/11 and 9/12 of the way to them, and in the end 1/4.
    """
    sae = build_sae(ReLUConfig(n_latents=1), 1)
    average, seen, x = WeightAverage(sae, 0.75), [], torch.ones(1, 1)
    with torch.no_grad():
        for value in (4.0, 8.0, 8.0, 0.0):
            sae.b_enc.fill_(value)
            average.update(sae_rows(x), 0.5)
            seen.append(float(average.mean["b_enc"]))
        assert seen == pytest.approx([4.0, 7.6, 7.6 + 9 / 11 * 0.4, (7.6 + 9 / 11 * 0.4) * 3 / 12])
        average.updates = 1000
        before = float(average.mean["b_enc"])
        average.update(sae_rows(x), 0.5)
        assert float(average.mean["b_enc"]) == pytest.approx(0.75 * before)
    assert not sae.b_enc.any()


def test_the_running_mean_has_a_threshold_and_unit_rows_of_its_own() -> None:
    """The running mean has its own threshold and unit rows.

    It keeps k latents active per row even if the encoder's weights doubled recently.
    """
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(1))
    sae = build_sae(BatchTopKConfig(n_latents=32, k=3, auxk=0), 8)
    initialise_tied(sae, sae_rows(x), seed=2)
    average = WeightAverage(sae, 0.9)
    average.update(sae_rows(x), 0.5)
    with torch.no_grad():
        sae.W_enc.mul_(2)
        sae.W_dec[0] = -sae.W_dec[1]
    sae.measure(sae_rows(x))
    average.update(sae_rows(x), 0.5)
    live = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    with average.applied():
        assert int(sae.infer(x).firings.sum()) == pytest.approx(3 * len(x), abs=1)
        lengths = sae.W_enc.detach().norm(dim=1)
        torch.testing.assert_close(lengths, 0.95 * live["W_enc"].norm(dim=1))
        torch.testing.assert_close(sae.W_dec.detach().norm(dim=1), torch.ones(32))
        with torch.no_grad():
            sae.b_dec.add_(1)  # changes only the running mean
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, live[name]), name


def test_fit_sums_over_the_set_and_not_over_batches() -> None:
    """Fit divides sums over two batches of different size, instead of averaging two ratios."""
    mean = torch.zeros(1)
    fired = torch.tensor([1, 0])
    fit = Fit.empty(2).add(torch.tensor([[1.0]]), Inferred(torch.tensor([[0.0]]), fired), mean)
    fit = fit.add(torch.tensor([[3.0]]), Inferred(torch.tensor([[3.0]]), fired), mean)
    assert fit.fvu == pytest.approx(1 / 10)  # (1 + 0) / (1 + 9); the mean of ratios would be 1/2
    assert fit.l0 == 1
    assert fit.densities.tolist() == [1.0, 0.0]


def test_fvu_of_the_identity_is_zero_and_of_the_mean_is_one() -> None:
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    mean, silent = x.mean(0), torch.zeros(1, dtype=torch.int64)
    assert Fit.empty(1).add(x, Inferred(x, silent), mean).fvu == 0
    assert Fit.empty(1).add(x, Inferred(mean.expand_as(x), silent), mean).fvu == pytest.approx(1)


def test_ce_recovered_is_one_for_the_identity_and_zero_for_the_ablation() -> None:
    assert ce_recovered(2.0, 2.0, 10.0) == 1
    assert ce_recovered(2.0, 10.0, 10.0) == 0
    assert ce_recovered(2.0, 4.0, 10.0) == 0.75
    # the ablation does no harm, so there is nothing to recover
    assert math.isnan(ce_recovered(2.0, 2.0, 2.0))


def test_duplicates_are_near_copies_of_other_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Duplicates are counted within experts and across them.

    Of 12 latents, 0 and 1 are near copies within an expert of 3. Latents 2 and 11 are copies in
    different experts.
    """
    W_dec = torch.eye(12, 16)
    W_dec[1] = 3 * W_dec[0] + 0.2
    W_dec[11] = 0.2 * W_dec[2]
    W_dec[7] = -W_dec[6]  # the opposite direction is another feature
    for chunk in (16_384, 5):
        monkeypatch.setattr(metrics, "DUPLICATES_CHUNK_LATENTS", chunk)
        assert duplicate_shares(lambda: [W_dec[:5], W_dec[5:]], 12, 4) == pytest.approx(
            (4 / 12, 2 / 12)
        )
        assert duplicate_shares(lambda: [W_dec], 12) == pytest.approx((4 / 12, 0))


class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counter of the scalars that the host reads from tensors. On CUDA each read blocks."""

    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += func is torch.ops.aten._local_scalar_dense.default  # noqa: SLF001
        return func(*args, **(kwargs or {}))


def test_parts_of_a_step_do_not_wait_for_the_device() -> None:
    sae = build_sae(BatchTopKConfig(n_latents=4, k=1, auxk=0), 8)
    x = torch.randn(9000, 8, generator=torch.Generator().manual_seed(3))
    entries = Entries(torch.zeros(9000, dtype=torch.int64), torch.arange(9000), 4)
    assert isinstance(sae.selection, BatchTopK)
    with Reads() as reads:  # type: ignore[no-untyped-call]
        sae.selection.update_threshold(
            torch.tensor(2.0, dtype=torch.float64), torch.tensor(data=True)
        )
        loss = auxk_loss(WHOLE, x, x, x / 2)
        nothing = auxk_loss(WHOLE, x, torch.ones_like(x), x / 2)
        sums = KERNELS.sum_by_latent(torch.ones(9000), entries, x)
    assert reads.n == 0
    assert sae.selection.theta == pytest.approx(2)
    assert float(loss) == pytest.approx(0.25, rel=1e-3)
    assert nothing == 0
    torch.testing.assert_close(
        sums, torch.stack([x.double().sum(0).float(), *3 * [torch.zeros(8)]])
    )
