"""Compute codes and reconstructions of exported dictionaries with the library they are for.

    python library_codes.py LIBRARY JOBS.json

Runs with the library's own Python, where dist_sae is not installed. Each job has a `folder` with a
dictionary, `rows` (a .npy file of fp64) and `out`, a folder for codes.npy and y_hat.npy. If a job
has `make`, SAELens first creates a dictionary of that architecture.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

D, N, K = 6, 32, 3
os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # read at import; Triton kernels cannot run on a CPU


def library_module(name: str) -> Any:
    """Import a module that only the library's Python has."""
    return importlib.import_module(name)


def sae_lens(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    SAE = library_module("sae_lens").SAE
    sae = SAE.load_from_disk(folder, device="cpu", dtype="float64")
    return sae.encode(x), sae(x)


def make(architecture: str, folder: Path) -> None:
    """Save a random dictionary with SAELens."""
    SAE = library_module("sae_lens").SAE
    config = SAE.get_sae_config_class_for_architecture(architecture)
    content: dict[str, Any] = {"architecture": architecture, "d_in": D, "d_sae": N}
    content |= {"dtype": "float32", "device": "cpu", "metadata": {"sae_lens_version": "6.54.12"}}
    if "transcoder" in architecture:
        content |= {"d_out": D, "apply_b_dec_to_input": False}
    content |= {"k": K} if architecture == "topk" else {}
    settings = config.from_dict(content)
    sae = SAE.get_sae_class_for_architecture(architecture)(settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
            if name == "threshold":
                parameter.abs_()
    sae.save_model(folder)


def sparsify(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    coder = library_module("sparsify").SparseCoder.load_from_disk(folder).double()
    found = coder.encode(x)
    codes = torch.zeros(len(x), coder.num_latents, dtype=x.dtype)
    codes.scatter_(1, found.top_indices, found.top_acts)
    y_hat = coder.decode(found.top_acts, found.top_indices)
    return codes, y_hat if coder.W_skip is None else y_hat + x @ coder.W_skip.mT


def dictionary_learning(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    utils = library_module("dictionary_learning.utils")
    dictionary, _ = utils.load_dictionary(str(folder), "cpu")
    dictionary.double()
    codes = dictionary.encode(x)
    return codes, dictionary.decode(codes)


def sae_bench(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Load dictionary_learning's files. Files that it would download come from the folder."""
    of = {
        "BatchTopKTrainer": ("batch_topk_sae", "batch_topk_sae"),
        "TopKTrainer": ("topk_sae", "topk_sae"),
        "StandardTrainer": ("relu_sae", "relu_sae"),
        "JumpReluTrainer": ("jumprelu_sae", "jump_relu_sae"),
        "GatedSAETrainer": ("gated_sae", "gated_sae"),
    }
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    module_name, name = of[trainer["trainer_class"]]
    module = library_module(f"sae_bench.custom_saes.{module_name}")
    module.hf_hub_download = lambda filename, **_: str(folder / Path(filename).name)
    load = getattr(module, f"load_dictionary_learning_{name}")
    sae = load("x", "ae.pt", trainer["lm_name"], torch.device("cpu"), torch.float64)
    codes = sae.encode(x)
    return codes, sae.decode(codes)


def circuit_tracer(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    if (folder / "layer_0.safetensors").exists():
        single = library_module("circuit_tracer.transcoder.single_layer_transcoder")
        whole = {"dtype": torch.float64, "lazy_encoder": False, "lazy_decoder": False}
        path = str(folder / "layer_0.safetensors")
        coder = single.load_relu_transcoder(path, 0, torch.device("cpu"), **whole).double()
        codes = coder.encode(x)
        return codes, coder.decode(codes, x)
    crossing = library_module("circuit_tracer.transcoder.cross_layer_transcoder")
    coder = crossing.load_clt(str(folder), dtype=torch.float64, device=torch.device("cpu")).double()
    by_layer = x.reshape(len(x), -1, D).transpose(0, 1)
    y_hat = torch.cat([coder(part) for part in torch.split(by_layer, 5000, dim=1)], 1)
    codes = coder.encode(by_layer)  # their latent i of layer l is our latent i * layers + l
    return codes.permute(1, 2, 0).reshape(len(x), -1), y_hat.transpose(0, 1).reshape(len(x), -1)


@torch.no_grad()
def main(library: str, jobs: str) -> None:
    """Run the jobs in a file."""
    read: Callable[[Path, Tensor], tuple[Tensor, Tensor]] = globals()[library]
    for job in json.loads(Path(jobs).read_text()):
        folder, out = Path(job["folder"]), Path(job["out"])
        if "make" in job:
            make(job["make"], folder)
        codes, y_hat = read(folder, torch.from_numpy(np.load(job["rows"])))
        np.save(out / "codes.npy", codes.numpy())
        np.save(out / "y_hat.npy", y_hat.numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
