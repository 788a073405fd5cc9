"""The gradient is one sum over replicas, whether they exchange gradients or rows and entries."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_sae.config import load_run
from dist_sae.distributed.gradients import Exchange, ReplicaSums
from dist_sae.distributed.zero import deepspeed_config
from dist_sae.errors import ConfigError
from dist_sae.kernels import Entries
from dist_sae.kernels.torch import KERNELS
from tests.dictionaries.products import make_entries
from tests.dictionaries.ranks import ThreadAxis, on_ranks
from tests.runs import write_run

ROWS, WIDTH = 6, 6
PATTERNS: list[list[list[int]]] = [  # latents of each row, per replica
    [[0, 3], [3], [], [9, 1], [], [3]],
    [[], [], [], [], [], []],
    [[9], [], [2, 3, 4], [3], [0, 1, 2, 3], []],
]


class CountingAxis(ThreadAxis):
    """An axis that counts the bytes that a ring of the replicas sends."""

    sent: Counter[str]

    def gather_replicas(self, tensor: Tensor) -> Tensor:
        self.sent["gathered"] += (self.replicas - 1) * tensor.nbytes
        return super().gather_replicas(tensor)

    def sum_replicas_(self, tensor: Tensor) -> None:
        self.sent["summed"] += 2 * (self.replicas - 1) * tensor.nbytes // self.replicas
        super().sum_replicas_(tensor)


def case(replica: int, n_latents: int) -> tuple[Tensor, Entries, Tensor]:
    """Return a replica's coefficients, entries and rows."""
    generator = torch.Generator().manual_seed(replica)
    entries = make_entries(PATTERNS[replica], n_latents=n_latents)
    coefficients = torch.randn(len(entries.latents), generator=generator, dtype=torch.float64)
    return coefficients, entries, torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("n_latents", "expected"), [(10, "summed"), (1000, "gathered")])
def test_the_sum_is_over_the_rows_of_all_replicas(n_latents: int, expected: str) -> None:
    """The sum excludes the component along W, and has the same bits on all ranks."""
    W = torch.linspace(-1, 1, n_latents * WIDTH, dtype=torch.float64).view(n_latents, WIDTH)
    alongs = [torch.full((n_latents,), 0.5 + r, dtype=torch.float64) for r in range(3)]
    for r, pattern in enumerate(PATTERNS):
        used = {latent for row in pattern for latent in row}
        alongs[r][[n for n in range(n_latents) if n not in used]] = 0
    cases = [case(r, n_latents) for r in range(3)]

    def work(axis: ThreadAxis) -> tuple[Tensor, Tensor, Any]:
        axis.__class__ = CountingAxis
        axis.sent = Counter()  # type: ignore[attr-defined]
        sums = ReplicaSums(KERNELS, axis)
        coefficients, entries, rows = cases[axis.replica]
        decoder = sums(coefficients, entries, rows, W, alongs[axis.replica])
        sent = dict(axis.sent)  # type: ignore[attr-defined]
        return decoder, sums(coefficients, entries.folded(ROWS), rows), sent

    wanted = sum(KERNELS.sum_by_latent(*of_one) for of_one in cases)
    along = torch.stack(alongs).sum(0)
    found = on_ranks(3, 1, work)
    for decoder, encoder, sent in found:
        torch.testing.assert_close(encoder, wanted, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(decoder, wanted - along[:, None] * W, rtol=1e-13, atol=1e-13)
        assert torch.equal(decoder, found[0][0])
        assert torch.equal(encoder, found[0][1])
        # a replica has at most 9 entries
        exchange = Exchange.of(3, W.numel(), ROWS * WIDTH, 9, 8)
        assert exchange.is_by_entry == (expected == "gathered")
        assert sent == {expected: exchange.by_entry if exchange.is_by_entry else exchange.dense}


def test_all_shards_exchange_alike() -> None:
    """Each shard alone would choose differently: the first would sum gradients for its 15 entries,
    and the other would gather 304 bytes.
    """
    patterns = [[*range(15)], [3]]
    shards = [make_entries([row, *[[]] * 5], n_latents=30) for row in patterns]

    def work(axis: ThreadAxis) -> set[str]:
        axis.__class__ = CountingAxis
        axis.sent = Counter()  # type: ignore[attr-defined]
        entries, rows = shards[axis.shard], torch.zeros(ROWS, WIDTH, dtype=torch.float64)
        ReplicaSums(KERNELS, axis)(rows.new_ones(len(entries.latents)), entries, rows)
        return set(axis.sent)  # type: ignore[attr-defined]

    assert Exchange.of(2, 180, 36, 15, 8) == Exchange(1440, 528)
    assert Exchange.of(2, 180, 36, 1, 8) == Exchange(1440, 304)
    assert on_ranks(2, 2, work) == [{"summed"}] * 4


def test_entries_are_exchanged_up_to_a_quarter_of_the_bytes() -> None:
    """A ring of 4 sends 1.5 x 3,200 bytes for 100 x 8 fp32 weights, and 3 x 160 bytes for 5 rows.

    An entry takes 12 bytes: its coefficient, its latent and its row. So 20 entries on each of the 3
    other ranks make a quarter.
    """
    assert Exchange.of(4, 800, 40, 0, 4) == Exchange(4800, 480)
    assert Exchange.of(4, 800, 40, 20, 4) == Exchange(4800, 1200)
    assert not Exchange.of(4, 800, 40, 20, 4).is_by_entry
    assert Exchange.of(4, 800, 40, 19, 4).is_by_entry


def test_settings_of_averages_are_refused_where_deepspeed_makes_none(tmp_path: Path) -> None:
    asked = {"prescale_gradients": True}
    with pytest.raises(
        ConfigError, match=r"^train\.deepspeed\.prescale_gradients: does nothing at"
    ):
        deepspeed_config(load_run(write_run(tmp_path, train={"deepspeed": asked})))
    zero = asked | {"zero_optimization": {"stage": 1}}
    made = deepspeed_config(load_run(write_run(tmp_path, train={"deepspeed": zero})))
    assert made["prescale_gradients"]
