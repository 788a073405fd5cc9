"""Copies of rows from a device to the host. An event to wait for stands in for the GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dist_sae.models.forward import Forward, RowTransfer

SITES = ("a", "b")


class Device:
    """A device that numbers its batches, and logs each run and each wait for a copy."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def run(self, tokens: Tensor, _: Tensor) -> dict[str, Tensor]:
        self.log.append(f"run {int(tokens[0, 0])}")
        acts = tokens[:, :, None].float().expand(*tokens.shape, 3)
        return {"a": acts, "b": -acts}

    def event(self, number: int) -> Any:
        log = self.log

        class Event:
            def synchronize(self) -> None:
                log.append(f"copied {number}")

        return Event()


@pytest.fixture
def forward(monkeypatch: pytest.MonkeyPatch) -> tuple[Forward, Device]:
    device = Device()

    def made(rows: dict[str, Tensor]) -> RowTransfer:
        return RowTransfer(rows, device.event(int(rows["a"][0, 0])))

    forward = Forward(device, torch.bfloat16)
    monkeypatch.setattr(forward, "send", made)
    return forward, device


def batch(number: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.full((2, 4), number, dtype=torch.int32)
    keep = torch.zeros(2, 4, dtype=torch.bool)
    keep[0, 1:3] = keep[1, 3] = True
    return tokens, torch.ones_like(keep), keep


def test_the_model_is_two_batches_ahead_of_its_copies_and_no_more(
    forward: tuple[Forward, Device],
) -> None:
    model, device = forward
    transfers = [one for number in range(1, 5) for one in model(*batch(number))]
    assert device.log == ["run 1", "run 2", "copied 1", "run 3", "copied 2", "run 4"]
    for number, one in enumerate(transfers, 1):
        rows = one.wait()
        for site, sign in zip(SITES, (1, -1), strict=True):
            expected = torch.full((3, 3), sign * number, dtype=torch.bfloat16)
            assert torch.equal(rows[site], expected)
    assert device.log[-2:] == ["copied 3", "copied 4"]  # each copy is waited for once


def test_rows_that_arrived_are_no_longer_where_the_copy_put_them(
    forward: tuple[Forward, Device],
) -> None:
    """`wait` returns copies of the rows, because the pinned memory is used again.

    Taking one site out of the result keeps the others.
    """
    _, device = forward
    pinned = {"a": torch.ones(2, 3), "b": torch.zeros(2, 3)}
    transfer = RowTransfer(pinned, device.event(1))
    rows = transfer.wait()
    assert rows["a"].data_ptr() != pinned["a"].data_ptr()
    assert torch.equal(rows.pop("a"), torch.ones(2, 3))
    assert transfer.wait().keys() == {"b"}
