"""The code blocks of docs/python.md run in order, on a small quickstart."""

import re
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_sae.config import load_run
from dist_sae.data.work_queue import Worker
from dist_sae.index.build import index
from dist_sae.interop.export import export
from dist_sae.telemetry.exporter import Telemetry
from tests.launch import train
from tests.notebook.raw import fill, save_language_model, write_text

ROOT = Path(__file__).parent.parent
ROWS, LATENTS = 8192, 4096
SMALLER = {
    "store.activations": "work/activations",
    "store.runs": "work/runs",
    "activations.unit_rows": 2000,
    "activations.heldout_share": 0.1,
    "train.rows": ROWS,
    "train.max_passes": 1,
    "train.save_every_steps": 4,
    "processes.producers": 1,
    "processes.trainers": 1,
}


@pytest.fixture
def quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The quickstart run in its own folder, with a smaller model, text and training."""
    monkeypatch.chdir(tmp_path)
    save_language_model(tmp_path / "work/smollm2", layers=9)
    write_text(tmp_path / "work/wikipedia.jsonl", documents=90, words=24)
    settings = [f"{key}={value}" for key, value in SMALLER.items()]
    places = [f"model.path={tmp_path}/work/smollm2"]
    places += [f"corpus.files=[{tmp_path}/work/wikipedia.jsonl]"]
    places += [f"store.{name}={tmp_path}/work/{name}" for name in ("activations", "runs")]
    path = ROOT / "launch/runs/smollm2-resid7-topk-cpu.yaml"
    run = load_run(path, [*settings, *places])
    fill(run)
    train(path, *(word for each in (*settings, *places) for word in ("--set", each)))
    export(run)
    index(run, Worker("i"), threading.Event(), Telemetry(run.name, "index", None), None)
    return tmp_path


@pytest.mark.system
@pytest.mark.usefixtures("quickstart")
def test_the_guide_runs_as_it_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    """All blocks run in one namespace, and the shapes and values that their comments state are
    true.
    """
    blocks = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "docs/python.md").read_text(), re.S | re.M
    )
    assert len(blocks) > 9
    names: dict[str, Any] = {}
    seen: list[dict[str, Any]] = []
    # WebDataset leaves its files to be closed by the garbage collector
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for block in blocks:
            exec(compile(block, "docs/python.md", "exec"), names)
            seen.append(dict(names))
    run, dictionary = names["run"], names["dictionary"]
    assert run.steps()[-1] == dictionary.step == ROWS // 2048
    assert 0 < float(names["fvu"]) < 1
    assert seen[2]["dense"].shape == (1024, LATENTS)
    assert seen[2]["x"].shape == (1024, 24)
    torch.testing.assert_close(seen[2]["x_hat"], dictionary(seen[2]["x"]), rtol=1e-4, atol=1e-4)
    assert names["firings"].sum() > 0
    of_x = dictionary.encode(names["x"], dense=True)  # `codes` of the last block are SAELens's
    lengths = of_x * dictionary.scales[dictionary.reads[0]] * dictionary.W_dec.norm(dim=1)
    torch.testing.assert_close(names["codes"], lengths, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(names["x_hat"], dictionary(names["x"]), rtol=1e-3, atol=1e-3)
    said = capsys.readouterr().out
    assert re.search(r"\[.\]", said)
    assert "The best thing about my holiday was" in said


def test_a_shard_is_read_in_five_lines_without_dist_sae() -> None:
    (block,) = re.findall(
        r"^```python\n([^`]*WebDataset.*?)^```$", (ROOT / "docs/python.md").read_text(), re.S | re.M
    )
    lines = [line for line in block.splitlines() if line and not line.startswith("urls")]
    assert len(lines) == 5
    assert not any("dist_sae" in line for line in lines)
