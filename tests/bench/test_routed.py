"""`dist-sae bench routed` as a program."""

import json

import pytest

from tests.bench.test_step import SMALL
from tests.launch import run

pytestmark = pytest.mark.system


def test_bench_routed_compares_with_an_exact_dictionary() -> None:
    options = (*SMALL, "--experts", "4", "--products", "fp32", "--json")
    result = json.loads(run("bench", "routed", *options).splitlines()[-1])
    assert result["exact_seconds"] > 0
    assert result["routed_seconds"] > 0
    assert result["speedup_low"] <= result["speedup"] <= result["speedup_high"]
    assert 1 <= result["expert_load_ratio"] <= 4
    assert (result["experts"], result["products"]) == (4, "fp32")


@pytest.mark.parametrize("experts", ["3", "0"])
def test_bench_routed_refuses_experts_that_cannot_be(experts: str) -> None:
    message = run("bench", "routed", *SMALL, "--experts", experts, code=2)
    assert message.startswith("error: bench: sae")
    assert "experts" in message
