"""`dist-sae bench step` as a program: its measurements, and errors for bad settings."""

import json

import pytest

from tests.launch import run

pytestmark = pytest.mark.system

SMALL = ("--d-in", "16", "--n-latents", "256", "--k", "4", "--batch", "64", "--rounds", "3")


def test_bench_step_reports_the_ratio_and_where_the_time_goes() -> None:
    result = json.loads(run("bench", "step", *SMALL, "--json").splitlines()[-1])
    assert result["step_seconds"] > 0
    assert result["ratio_low"] <= result["ratio"] <= result["ratio_high"]
    assert result["rows_per_second"] == 64 / result["step_seconds"]
    assert {"product", "select", "decode", "gradients_of_weights", "adam"} <= result[
        "phases"
    ].keys()


def test_bench_step_refuses_in_one_line_what_cannot_be() -> None:
    """Bad settings are refused before the rendezvous, and named as in the run file."""
    for options, expected in (
        (("--k", "0"), "error: bench: sae.k: input should be greater than 0 (got 0)\n"),
        (
            ("--shards", "2"),
            "error: bench: processes.latent_shards: 2 does not divide processes.trainers (1)\n",
        ),
        (("--k", "300"), "error: bench: sae: k (300) must not exceed n_latents (256)\n"),
    ):
        assert run("bench", "step", *SMALL, *options, code=2) == expected
