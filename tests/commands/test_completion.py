"""Shell completion: bash runs its own script, and the other scripts must have the same words."""

import subprocess
from pathlib import Path

import pytest

from dist_sae.commands.cli import main

ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($#-1)); COMPREPLY=()
_dist_sae
printf "%s\\n" "${COMPREPLY[@]}"
"""


@pytest.fixture
def script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["completion", "bash"]) == 0
    path = tmp_path / "script"
    path.write_text(capsys.readouterr().out)
    return path


@pytest.mark.parametrize(
    ("words", "answers"),
    [
        (["sto"], ["store"]),
        (["store", ""], ["verify", "ls", "urls", "gc", "--help"]),
        (["store", "urls", "--h"], ["--help", "--heldout"]),
        (["train", "re"], ["real.yaml"]),
        (["train", "real.yaml", "--set", "sae.n_l"], ["sae.n_latents="]),
        (["bench", "st"], ["step", "store"]),
        (["completion", "f"], ["fish"]),
    ],
)
def test_bash_completes(script: Path, tmp_path: Path, words: list[str], answers: list[str]) -> None:
    (tmp_path / "real.yaml").touch()
    (tmp_path / "read.txt").touch()
    command = ["bash", "-c", ASK, "bash", str(script), "dist-sae", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == answers
    assert not done.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_the_same_words(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    said = capsys.readouterr().out
    for word in ("checkpoints", "convert", "heldout", "sae.n_latents=", ".y"):
        assert word in said.replace("sae.n_latents ", "sae.n_latents= ")
