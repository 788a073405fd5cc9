"""Exported hook points have our rows in TransformerLens's bridge, for each architecture.

Run with --long: this installs SAELens and TransformerLens into a separate environment.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from dist_sae.bench.peers.environments import ensure_environment
from dist_sae.config.data import SITE_NAMES, HuggingFaceModel
from dist_sae.interop.sae_lens import hook
from dist_sae.models.huggingface import HuggingFaceSource
from tests.interop.test_libraries import LIBRARIES, PEERS
from tests.models.test_huggingface import COMMON, save_model

hf: Any = transformers
ARCHITECTURES: dict[str, Any] = {
    "llama": None,
    "smollm2": hf.LlamaConfig(**COMMON, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": None,
    "gpt_neox": None,
    "gpt2": None,
    "gemma2": None,
    "olmo2": hf.Olmo2Config(**COMMON, num_key_value_heads=2),
}


def test_rows_of_every_site_are_those_of_its_hook_point(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    if not pytestconfig.getoption("--long"):
        pytest.skip("installs TransformerLens; needs --long")
    tokens = torch.randint(3, 50, (4, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    np.save(tmp_path / "tokens.npy", tokens.numpy())
    jobs, ours = [], {}
    for name, config in ARCHITECTURES.items():
        model = HuggingFaceModel(path=str(save_model(tmp_path / name, name, config)), dtype="fp32")
        sites = [f"{site}.1" for site in SITE_NAMES]
        with torch.no_grad():
            rows = HuggingFaceSource(model, tuple(sites)).run(tokens.int(), mask)
        ours[name] = {hook(model, site)[1]: rows[site].numpy() for site in sites}
        jobs.append(
            {
                "folder": model.path,
                "tokens": str(tmp_path / "tokens.npy"),
                "hooks": list(ours[name]),
                "out": str(tmp_path / f"{name}.npz"),
            }
        )
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    python = ensure_environment(LIBRARIES["sae_lens"], Path(PEERS))
    script = Path(__file__).parent / "library_hooks.py"
    command = [str(python), str(script), str(tmp_path / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    wrong = {}
    for name, points in ours.items():
        theirs = np.load(tmp_path / f"{name}.npz")
        for point, acts in points.items():
            difference = np.linalg.norm(acts - theirs[point]) / np.linalg.norm(acts)
            if not difference < 1e-4:
                wrong[name, point] = float(difference)
    assert not wrong
