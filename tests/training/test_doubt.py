"""The trainer warns once about a dictionary that is not sparse."""

from pathlib import Path

from tests.launch import train
from tests.training.trained import run_file


def test_a_dictionary_that_is_not_sparse_is_doubted_once(tmp_path: Path, activations: str) -> None:
    """Without a penalty, half of the 64 latents are active, and rows have only 16 values."""
    sae = {"kind": "relu", "n_latents": 64, "sparsity": 0.0}
    [said] = train(run_file(tmp_path, activations, sae=sae))
    [line] = [line for line in said.splitlines() if "raise sae.sparsity" in line]
    assert "latents are active per row of 16 numbers, which is not sparse" in line
