"""Which GPU a process uses, and the message if there is none."""

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dist_sae.commands.cli import main
from dist_sae.commands.pipeline import run_locally
from dist_sae.config import load_run
from dist_sae.device import (
    apply_device_setting,
    check_gpus,
    copied_to_cpu,
    device_of,
    in_tf32,
    own_device,
    share_gpus,
)
from dist_sae.errors import ConfigError
from tests.runs import write_run

OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
    "driver by downloading and installing a new version from the URL: http://www.nvidia.com/"
)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that gives this machine some GPUs, or a reason why torch cannot use any."""

    def set_up(gpus: int = 0, reason: str = "") -> None:
        def fail() -> None:
            raise RuntimeError(reason)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "init", fail)
        monkeypatch.setattr(torch.version, "cuda", "13.0")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return set_up


def test_a_process_uses_the_gpu_of_its_own_number(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(gpus=2)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device() == torch.device("cuda", 1)
    with pytest.raises(
        ConfigError, match="has 2 GPUs, but none for local rank 2; start fewer ranks"
    ):
        device_of(2)
    machine(gpus=0)
    assert own_device() == torch.device("cpu")


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([2, 1, 1], ["0,1", "2", "3"]),
        ([1, 1, 1, 1, 1], ["0", "1", "2", "3", "0"]),
        ([2, 3, 3], ["0,1", "2,3,0", "1,2,3"]),  # the GPUs of a group are always different
    ],
)
def test_groups_of_processes_share_out_the_gpus(
    machine: Callable[..., None], groups: list[int], expected: list[str]
) -> None:
    machine(gpus=4)
    assert [share["CUDA_VISIBLE_DEVICES"] for share in share_gpus(groups)] == expected
    machine(gpus=0)
    assert share_gpus(groups) == [{}] * len(groups)


def test_gpus_are_shared_out_among_those_that_are_visible(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(gpus=2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,GPU-8932f937")
    assert share_gpus([1, 1]) == [
        {"CUDA_VISIBLE_DEVICES": "6"},
        {"CUDA_VISIBLE_DEVICES": "GPU-8932f937"},
    ]


def test_a_local_run_gives_every_process_a_gpu_of_its_own(
    tmp_path: Path, machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each program is a shell script that records the GPUs and rank that it got."""
    machine(gpus=4)
    said = tmp_path / "said"
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\necho "$3 $6 $LOCAL_RANK $CUDA_VISIBLE_DEVICES" >> {said}\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    counts = {"trainers": 2, "producers": 3}
    path = write_run(tmp_path, processes=counts, index={"workers": 2, "latent_shards": 2})
    run_locally(load_run(path), [str(path)], threading.Event())
    lines = [line.split() for line in said.read_text().splitlines()]
    trainers = sorted(line[2:] for line in lines if line[0] == "train")
    assert trainers == [["0", "0,1"], ["1", "0,1"]]
    producers = {line[1]: line[2:] for line in lines if line[0] == "produce"}
    assert producers == {
        "world-producer-0": ["0", "2"],
        "world-producer-1": ["0", "3"],
        "world-producer-2": ["0", "0"],
    }
    indexers = sorted([line[1], *line[2:]] for line in lines if line[0] == "index")
    assert indexers == [
        ["world-index-0", "0", "0,1"],
        ["world-index-0", "1", "0,1"],
        ["world-index-1", "0", "2,3"],
        ["world-index-1", "1", "2,3"],
    ]


def test_ranks_without_a_gpu_each_are_refused_before_anything_starts(
    tmp_path: Path, machine: Callable[..., None]
) -> None:
    machine(gpus=1)
    path = write_run(tmp_path, processes={"trainers": 2})
    with pytest.raises(ConfigError, match=r"processes\.trainers: 2 ranks .* it has 1; lower proc"):
        run_locally(load_run(path), [str(path)], threading.Event())
    assert not (tmp_path / "runs").exists()
    check_gpus("processes.trainers", 1)
    machine(gpus=0)
    check_gpus("processes.trainers", 2)  # ranks share a CPU


@pytest.mark.parametrize("command", ["evaluate", "index", "produce", "train"])
def test_ranks_of_a_pod_are_refused_before_they_start(
    tmp_path: Path,
    machine: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    machine(gpus=1)
    ranks = ["--set", "processes.trainers=2", "--set", "index.latent_shards=2"]
    path = write_run(tmp_path, processes={"trainers": 2}, index={"latent_shards": 2})
    if command == "produce":
        model = {"kind": "huggingface", "path": "nowhere", "tensor_parallel": 2}
        files = {"kind": "files", "files": ["nowhere"]}
        sites = {"sites": ["resid_post.0"]}
        path = write_run(tmp_path, model=model, corpus=files, activations=sites)
        ranks = []
    assert main([command, str(path), *ranks, "--local-ranks", "2"]) == 2
    expected = "error: --local-ranks: 2 ranks on this machine need a GPU each, but it has 1"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "evaluate", "index", "produce", "train"])
def test_who_asks_for_a_gpu_never_computes_on_the_cpu(
    tmp_path: Path,
    machine: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    machine(reason=OLD_DRIVER)
    path = write_run(tmp_path, processes={"device": "cuda"})
    assert main([command, str(path)]) == 2
    assert capsys.readouterr().err == (
        "error: processes.device: cuda: The NVIDIA driver on your system is too old (found version "
        f"11040) (torch {torch.__version__}); fix this, or set processes.device: cpu\n"
    )
    assert not (tmp_path / "runs").exists()


def test_the_reason_is_said_why_there_is_no_gpu(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES is empty"):
        apply_device_setting("cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match="is built for CPUs only"):
        apply_device_setting("cuda")


def test_a_gpu_that_lies_idle_is_warned_of(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = [Path("/dev/nvidia0")]
    monkeypatch.setattr(Path, "glob", lambda *_: iter(there))
    machine(reason=OLD_DRIVER)
    warning = apply_device_setting("auto")
    assert warning is not None
    assert warning.startswith("this machine's GPU is not used: The NVIDIA driver on your")
    there.clear()
    assert apply_device_setting("auto") is None


def test_no_gpu_is_used_where_none_is_wanted(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    machine(gpus=1)
    assert apply_device_setting("cpu") is None
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_products_are_in_tf32_on_a_gpu_and_only_meanwhile() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    with in_tf32(torch.device("cuda")):
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    with in_tf32(torch.device("cpu")):
        assert torch.backends.cuda.matmul.fp32_precision == before


def test_a_copy_for_a_checkpoint_does_not_follow_the_weights() -> None:
    weights = torch.ones(3, 2)
    copy = copied_to_cpu(weights)
    weights.zero_()
    assert torch.equal(copy, torch.ones(3, 2))
