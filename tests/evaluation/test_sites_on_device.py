"""Dictionaries of two sites, evaluated and indexed on a fake device."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_sae.checkpoint.trained import find_checkpoint
from dist_sae.config import Run
from dist_sae.dictionaries import build_sae
from dist_sae.dictionaries.axis import WHOLE
from dist_sae.dictionaries.interface import Widths
from dist_sae.distributed.mesh import Mesh
from dist_sae.evaluation.evaluate import evaluate
from dist_sae.index.cells import compute_cells
from dist_sae.index.context import open_index
from dist_sae.index.encode import open_encoder
from dist_sae.index.neighbours import neighbours
from dist_sae.kernels.torch import KERNELS
from dist_sae.storage import open_store
from dist_sae.telemetry.exporter import Telemetry
from tests.fake_device import DEVICE, fake_device
from tests.notebook.raw import language_run, save_dictionary, save_language_model
from tests.world import same

SITES = ("attn_out.0", "resid_post.1")
WIDTH = 24
BOTH = {"reads": list(SITES)}
RECIPES: dict[str, dict[str, Any]] = {
    "transcoder": {"k": 4, "auxk": 0, "skip": True, "reads": [SITES[0]], "writes": [SITES[1]]},
    "crosscoder": {"k": 4, "auxk": 0, **BOTH},
    "crosscoder_relu": BOTH,
    "clt": {"k": 4, "auxk": 0, **BOTH},
    "clt_jumprelu": BOTH,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("sites")
    sae = {"kind": "clt", "n_latents": 64, **RECIPES["clt"]}
    return language_run(folder, save_language_model(folder / "model"), sae)


def trained(world: Run, kind: str) -> Run:
    """Return a run with a checkpoint of random weights."""
    settings = world.model_dump(mode="json") | {
        "name": kind.replace("_", "-"),
        "sae": {"kind": kind, "n_latents": 64, **RECIPES[kind]},
        "evaluate": {"contexts": 0},
    }
    run = Run.model_validate(settings)
    dictionary = build_sae(
        run.sae, Widths(*((WIDTH,) * len(sites) for sites in (run.reads, run.writes)))
    )
    generator = torch.Generator().manual_seed(1)
    for name, tensor in dictionary.tensors():
        if name == "threshold":
            tensor.copy_(torch.tensor([0.5, 1.0]))
        else:
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) / WIDTH**0.5)
    dictionary.constrain()
    save_dictionary(run, dictionary, 3)
    return run


@pytest.mark.parametrize("kind", RECIPES)
def test_evaluation_and_index_are_those_on_a_cpu(world: Run, kind: str) -> None:
    run = trained(world, kind)
    expected = evaluate(run)
    Path(run.store.runs, run.name, "evaluation.json").unlink()
    stopping, telemetry = threading.Event(), Telemetry(run.name, "index", None)
    opened = open_index(run, "w", stopping, telemetry, None)
    with fake_device() as waits:
        found = evaluate(run, mesh=Mesh(0, 1, DEVICE, WHOLE))
        assert waits
        with open_encoder(opened, WHOLE, DEVICE, stopping) as encoder:
            encoded = encoder.encode(0)
    for name in ("fvu", "l0", "density_counts"):
        assert found[name] == expected[name], name
    with open_encoder(opened, WHOLE, torch.device("cpu"), stopping) as encoder:
        encoder.sae.kernels = KERNELS
        wanted = encoder.encode(0)
    assert encoded.sums == wanted.sums
    for part in ("latents", "rows", "acts"):
        assert (getattr(encoded, part) == getattr(wanted, part)).all(), part


@pytest.mark.parametrize("search", ["all", "in cells"])
def test_nearest_latents_are_those_on_a_cpu(world: Run, search: str) -> None:
    run = trained(world, "crosscoder")
    checkpoint = find_checkpoint(open_store(run.store.runs), run, None)
    assert checkpoint

    def found(device: torch.device) -> tuple[Tensor, ...]:
        cells = compute_cells(checkpoint, device) if search == "in cells" else None
        return *(cells or ()), *neighbours(checkpoint, range(64), 4, cells, device)

    with fake_device() as waits:
        there = found(DEVICE)
        assert waits
    assert same(there, found(torch.device("cpu")))
