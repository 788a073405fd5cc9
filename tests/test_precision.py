"""The warning for a precision that the processor emulates."""

import logging

import pytest
import torch

from dist_sae.precision import is_emulated, warn_if_emulated

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("has", "emulated"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, True),
        ({"avx2": True, "avx512_bf16": True, "amx_bf16": False}, False),
        ({"neon": True, "bf16": True}, False),
        ({"neon": True}, True),
    ],
)
def test_bf16_is_told_by_the_processors_instructions(
    *,
    has: dict[str, bool],
    emulated: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert is_emulated("bf16", CPU) == emulated
    assert not is_emulated("fp32", CPU)
    assert not is_emulated("bf16", GPU)
    with caplog.at_level(logging.WARNING):
        warn_if_emulated("train.products", "bf16", CPU)
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["train.products"] * emulated
