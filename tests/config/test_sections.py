"""Run files whose sections contradict one another."""

from pathlib import Path

import pytest

from dist_sae.config import load_run
from tests.config.problems import problems
from tests.runs import TINY, write_run


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ["train.site=mlp_in.0"],
            "train.site: mlp_in.0 is not among activations.sites (synthetic)",
        ),
        (
            ["train.batch_rows=254"],
            "train.batch_rows: 254 is not a multiple of activations.streams (4)",
        ),
        (["train.rows=255"], "train.rows: 255 is less than one batch (256 rows)"),
        (
            ["store.retention=delete_consumed", "train.max_passes=2"],
            "store.retention: delete_consumed leaves no data for a second pass (train.max_passes)",
        ),
        (  # 2 windows of 4 units in 4 streams, and 2,048 + 4 * 256 rows in units of 2,048
            ["store.max_ahead_units=33"],
            "store.max_ahead_units: 33 would block the run: its streams' windows and its first "
            "3072 rows need 34 units at once; use 34 or more",
        ),
        (["processes.trainers=3"], "processes.trainers: 3 does not divide train.batch_rows (256)"),
        (
            ["processes.trainers=2", "processes.latent_shards=4"],
            "processes.latent_shards: 4 does not divide processes.trainers (2)",
        ),
        (
            ["processes.trainers=4", "processes.latent_shards=4", "sae.n_latents=33"],
            "sae.n_latents: 33 is not a multiple of processes.latent_shards (4); use 32 or 36",
        ),
        (
            ["processes.trainers=4", "processes.latent_shards=4", "sae.n_latents=3", "sae.auxk=0"],
            "sae.n_latents: 3 is not a multiple of processes.latent_shards (4); use 4",
        ),
        (
            [
                "processes.trainers=4",
                "processes.latent_shards=4",
                "sae.kind=routed",
                "sae.experts=2",
            ],
            "sae.experts: 2 is not a multiple of processes.latent_shards (4): "
            "each shard needs whole experts",
        ),
        (
            ["sae.n_latents=5000", "sae.init=data"],
            "sae.init: data needs 5000 rows, one per latent, which is more than train.rows (4096); "
            "train on more rows, lower sae.n_latents, or use random",
        ),
        (
            ["train.keep_best=1"],
            "train.keep_best: needs train.heldout_rows to tell which checkpoint is best",
        ),
        (
            ["train.heldout_rows=100", "activations.heldout_share=0"],
            "train.heldout_rows: nothing is held out; set activations.heldout_share",
        ),
        (
            ["telemetry.port=65535"],
            "telemetry.port: 65535 leaves no ports for 1 producers and 1 trainers: "
            "the last one would be 65536",
        ),
        (
            ["corpus={kind: dataset, name: x}"],
            "corpus.kind: model.kind and corpus.kind must both be synthetic, or neither",
        ),
        (
            ["activations.sites=[mlp_in.0]"],
            "activations.sites: a synthetic model has one site: [synthetic]",
        ),
        (
            ["model={kind: huggingface, path: x}", "corpus={kind: dataset, name: x}"],
            "activations.sites: synthetic is a site of the synthetic model only",
        ),
    ],
)
def test_load_run_checks_that_sections_agree(
    tmp_path: Path, overrides: list[str], problem: str
) -> None:
    assert problems(write_run(tmp_path, TINY), overrides) == [problem]


def test_load_run_asks_which_site_when_there_are_several(tmp_path: Path) -> None:
    overrides = [
        "model={kind: huggingface, path: x}",
        "corpus={kind: dataset, name: x}",
        "activations.sites=[mlp_in.0, mlp_out.0]",
    ]
    path = write_run(tmp_path, TINY)
    assert problems(path, overrides) == [
        "train.site: missing; activations.sites has several: mlp_in.0, mlp_out.0"
    ]
    assert load_run(path, [*overrides, "train.site=mlp_out.0"]).site == "mlp_out.0"


@pytest.mark.parametrize(
    ("sae", "problem"),
    [
        (
            "{kind: transcoder, reads: [mlp_in.0], writes: [mlp_out.7]}",
            "sae.writes: mlp_out.7 is not among activations.sites (mlp_in.0, mlp_out.0)",
        ),
        (
            "{kind: crosscoder, reads: [mlp_in.0, mlp_out.0, mlp_in.0]}",
            "sae.reads: names mlp_in.0 twice",
        ),
        (
            "{kind: topk, reads: [mlp_in.0, mlp_out.0]}",
            "sae.reads: topk reconstructs the one site that it reads; use transcoder, crosscoder "
            "or clt for others",
        ),
    ],
)
def test_load_run_refuses_sites_that_cannot_be_read_and_written(
    tmp_path: Path, sae: str, problem: str
) -> None:
    overrides = [
        "model={kind: huggingface, path: x}",
        "corpus={kind: dataset, name: x}",
        "activations.sites=[mlp_in.0, mlp_out.0]",
        f"sae={sae[:-1]}, n_latents: 32, k: 2}}",
    ]
    path = write_run(tmp_path, TINY)
    assert problems(path, overrides) == [problem]
    named = "train.site: sae.reads already names the sites; leave one of them out"
    assert named in problems(path, [*overrides, "train.site=mlp_in.0"])


def test_load_run_reports_every_disagreement_at_once(tmp_path: Path) -> None:
    overrides = ["train.batch_rows=6", "train.rows=5", "processes.trainers=4"]
    assert [line.partition(":")[0] for line in problems(write_run(tmp_path, TINY), overrides)] == [
        "train.batch_rows",
        "train.rows",
        "processes.trainers",
        "sae.init",
    ]
