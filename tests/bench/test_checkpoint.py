"""`dist-sae bench checkpoint` as a program."""

import json
from pathlib import Path

import pytest

from tests.launch import run

pytestmark = pytest.mark.system

SMALL = ("--d-in", "16", "--n-latents", "256", "--k", "4", "--batch", "64", "--rounds", "2")


def test_bench_checkpoint_measures_saving_and_loading(tmp_path: Path) -> None:
    out = run("bench", "checkpoint", "--url", str(tmp_path), *SMALL, "--every", "50", "--json")
    result = json.loads(out.splitlines()[-1])
    parameters = 2 * 256 * 16 + 256 + 16
    assert result["checkpoint_bytes"] > 3 * 4 * parameters  # weights and both moments, fp32
    assert 0 < result["stall_seconds"] < result["durable_seconds"]
    assert result["share_low"] <= result["share"] <= result["share_high"]
    for shards in (1, 2, 4):
        assert result[f"load_1_of_{shards}_seconds"] > 0
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            ("--n-latents", "258"),
            "bench: sae.n_latents: 258 is not a multiple of processes.latent_shards (4); "
            "use 256 or 260",
        ),
        (
            ("--endpoint-url", "host:1"),
            "bench: store.s3.endpoint_url: host:1 has no scheme: "
            "write http://host:port or https://host",
        ),
    ],
)
def test_bench_checkpoint_refuses_in_one_line_what_cannot_be(
    tmp_path: Path, options: tuple[str, ...], problem: str
) -> None:
    said = run("bench", "checkpoint", "--url", str(tmp_path), *SMALL, *options, code=2)
    assert said.splitlines()[-1] == f"error: {problem}"
