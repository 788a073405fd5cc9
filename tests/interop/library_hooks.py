"""Compute activations at hook points of TransformerLens's bridge.

    python library_hooks.py JOBS.json

Runs with TransformerLens's own Python, where dist_sae is not installed. Each job has a `folder`
with a model and its tokenizer, `tokens` (a .npy file), `hooks`, and `out`, the .npz file for the
activations.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

hf: Any = transformers


def main(jobs: str) -> None:
    """Run the jobs in a file."""
    library: Any = importlib.import_module("transformer_lens.model_bridge")
    for job in json.loads(Path(jobs).read_text()):
        bridge = library.TransformerBridge.boot_transformers(
            job["folder"],
            device="cpu",
            hf_model=hf.AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32),
            tokenizer=hf.AutoTokenizer.from_pretrained(job["folder"]),
        )
        tokens = torch.from_numpy(np.load(job["tokens"])).long()
        with torch.no_grad():
            _, cache = bridge.run_with_cache(tokens)
        found = {hook: cache[hook].flatten(2) for hook in job["hooks"]}
        np.savez(job["out"], **{name: acts.numpy() for name, acts in found.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
