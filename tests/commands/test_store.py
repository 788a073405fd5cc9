"""`dist-sae store` on the command line, and its shards as webdataset reads them."""

import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
import webdataset

from dist_sae.commands.cli import main
from dist_sae.config import load_run
from dist_sae.data.consumers import Consumers
from dist_sae.data.plan import load_plan
from dist_sae.data.shard import read_manifest
from dist_sae.storage import open_store
from tests.runs import TINY, write_run


@pytest.fixture(scope="module")
def produced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run file of a complete activation set in bf16, with an orphaned shard of unit 0."""
    path = write_run(tmp_path_factory.mktemp("set"), TINY, activations={"dtype": "bf16"})
    for command in ("plan", "produce"):
        assert main([command, str(path)]) == 0
    orphan = next((path.parent / "activations/shards/synthetic").glob("00000000-*.tar"))
    orphan.with_name("00000000-00000000.tar").write_bytes(orphan.read_bytes())
    return path


def listed(capsys: pytest.CaptureFixture[str], path: Path, *options: str) -> list[str]:
    capsys.readouterr()
    assert main(["store", "urls", str(path), *options]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("options", [[], ["--heldout"]])
def test_urls_are_the_shards_of_one_part_as_webdataset_reads_them(
    produced: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    run = load_run(produced)
    store = open_store(run.store.activations)
    plan = load_plan(store, run)
    units = plan.heldout_units if options else plan.train_units
    rows = []
    urls = listed(capsys, produced, *options, "--site", "synthetic")
    # WebDataset leaves its file to be closed by the garbage collector
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    for sample in samples:
        tensors = safetensors.torch.load(sample["safetensors"])
        assert tensors["acts"].dtype == torch.bfloat16
        rows.append(tensors["acts"].float().numpy())  # NumPy has no bfloat16
    assert sum(map(len, rows)) == sum(read_manifest(store, unit).rows for unit in units)
    assert len(urls) == len(units)


def test_urls_of_a_site_that_is_not_there_are_refused(
    produced: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["store", "urls", str(produced), "--site", "resid_post.3"]) == 2
    assert "--site resid_post.3: " in capsys.readouterr().err


def test_ls_names_runs_and_claims(produced: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = load_run(produced)
    store = open_store(run.store.activations)
    consumers = Consumers(store, 1.0)
    store.put("claims/00000001.json", b"{}")
    consumers.report("other", reached=3, needed=2)
    capsys.readouterr()
    assert main(["store", "ls", str(produced)]) == 0
    said = [
        line.partition("last reported")[0].rstrip() for line in capsys.readouterr().out.splitlines()
    ]
    assert "run                  other: reads unit 3, needs 2 and later;" in said
    assert any(
        line.startswith("claim                claims/00000001.json: renewed ") for line in said
    )
    store.delete("claims/00000001.json")
    store.delete("consumers/other.json")
    assert main(["store", "ls", str(produced)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["run                  none", "claim                none"]
