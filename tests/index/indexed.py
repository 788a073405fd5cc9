"""Small indexed worlds, and a brute-force oracle of their indexes."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.checkpoint.run_folder import run_file_key
from dist_sae.config import Run, dump_run
from dist_sae.data.consumers import kept_units
from dist_sae.data.plan import load_plan
from dist_sae.data.shard import read_block
from dist_sae.data.work_queue import Worker
from dist_sae.dictionaries import build_sae
from dist_sae.dictionaries.base import Dictionary
from dist_sae.index.build import index
from dist_sae.producing.loop import produce
from dist_sae.producing.planner import plan
from dist_sae.storage import open_store
from dist_sae.telemetry.exporter import Telemetry
from tests.runs import make_run
from tests.world import open_activation_set, save

SCALE = 1.5
RECIPES: dict[str, dict[str, Any]] = {
    "topk": {"k": 5, "auxk": 7},
    "batchtopk": {"k": 5, "auxk": 7},
    "matryoshka": {"k": 5, "auxk": 7},
    "routed": {"k": 6, "auxk": 7, "experts": 4, "experts_per_row": 2},
    "jumprelu": {},
    "jumprelu_tanh": {},
    "relu": {},
    "gated": {},
}
WORLD: dict[str, Any] = {
    "name": "world",
    "model": {"kind": "synthetic", "d_in": 16, "n_features": 48, "l0": 3},
    "corpus": {"kind": "synthetic", "documents": 100, "document_rows": 32},
    "activations": {
        "sites": ["synthetic"],
        "context_tokens": 32,
        "unit_rows": 350,
        "block_rows": 100,
        "streams": 2,
        "window_units": 1,
        "heldout_share": 0.1,
        "dtype": "fp32",
    },
    "sae": {"n_latents": 64},
    "train": {"rows": 1024, "batch_rows": 64, "normaliser_rows": 500},
    "index": {"examples": 6, "decile_examples": 2, "pairs": 1000},
}


def produced(folder: Path, kind: str = "topk", **sections: Any) -> Run:
    """Make a run with activations and without a checkpoint."""
    sae = {"kind": kind, "n_latents": 64, **RECIPES[kind]}
    run = make_run(folder, WORLD, **{"sae": sae, **sections})
    made = plan(run)
    produce(run, Worker("p"), threading.Event(), Telemetry("world", "produce", None))
    return made_run(run, made)


def made_run(run: Run, made: Any) -> Run:
    return Run.model_validate(made.resolve(run).model_dump(mode="json"))


def add_checkpoint(
    run: Run,
    step: int = 3,
    seed: int = 0,
    change: Callable[[Dictionary], None] = lambda sae: None,  # noqa: ARG005 - changes nothing
) -> Dictionary:
    """Save a checkpoint with random weights, in which some latents are dense and some dead."""
    generator = torch.Generator().manual_seed(seed)
    d_in = 16
    sae = build_sae(run.sae, d_in)
    for name, tensor in sae.tensors():
        if name in ("W_enc", "W_dec"):
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
        elif name == "threshold":
            tensor.copy_(torch.tensor([0.8, 1.0]))
        elif "log" not in name:
            tensor.data.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    sae.b_enc.data[:3] += 3
    sae.b_enc.data[-5:] -= 1e3
    sae.constrain()
    change(sae)
    store = open_store(run.store.activations)
    scalars = {
        "run": run.model_dump(mode="json"),
        "plan": load_plan(store, run).hash,
        "scale": SCALE,
        "mean": [0.25] * d_in,
        "variance": 1.0,
        "rows": 1,
    }
    tensors = {name: tensor.detach() for name, tensor in sae.tensors()}
    tensors["idle_rows"] = torch.zeros(len(sae.W_enc), dtype=torch.int64)
    runs = open_store(run.store.runs, run.store.s3)
    save(Checkpoints(runs, run.name, 9), step, tensors, scalars)
    runs.put(run_file_key(run.name), dump_run(run).encode())
    return sae


def make_index(run: Run, worker: str = "w", **options: Any) -> dict[str, Any]:
    telemetry = Telemetry(run.name, "index", None)
    return index(run, Worker(worker), threading.Event(), telemetry, **options)


def tables(place: str, name: str) -> pa.Table:
    """Return all rows of a table of an index."""
    return pa.concat_tables(map(pq.read_table, sorted(Path(place, name).glob("*.parquet"))))


def files(place: str) -> dict[str, bytes]:
    """Return the content of an index's table files, by relative path."""
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in sorted(Path(place).rglob("*.parquet"))
    }


class Oracle:
    """Content of an index, computed by brute force from dense codes in memory."""

    def __init__(self, run: Run, sae: Dictionary) -> None:
        activations = open_activation_set(run)
        made, store = activations.plan, activations.store
        self.units = sorted([*made.heldout_units, *kept_units(store, made)])
        names, codes, error, total = [], [], 0.0, 0.0
        for unit in self.units:
            shard = activations.manifest(unit).sites[run.site]
            row = 0
            for block in range(len(shard.blocks)):
                rows = read_block(store, shard, block)
                x = rows.acts.float() * SCALE
                found = sae.encode(x)
                dense = torch.zeros(len(x), sae.n_latents)
                ends = [*found.starts.tolist(), len(found.acts)]
                for i in range(len(x)):
                    here = slice(ends[i], ends[i + 1])
                    dense[i, found.latents[here]] = found.acts[here]
                    names.append((unit, row, *(int(c[i]) for c in rows[1:])))
                    row += 1
                x_hat = sae.infer(x).x_hat.double()
                error += float((x.double() - x_hat).square().sum())
                total += float((x.double() - 0.25).square().sum())
                codes.append(dense.numpy())
        self.names = names
        """Unit, row, token, position and document of each row."""
        self.codes = np.concatenate([with_11_bits(part) for part in codes])
        self.fvu = error / total
        self.l0 = float((self.codes > 0).sum() / len(self.codes))

    def firings(self, latent: int) -> list[tuple[float, int]]:
        """Return activation and row of each firing, in the order of rows."""
        column = self.codes[:, latent]
        return [(float(column[row]), int(row)) for row in np.flatnonzero(column > 0)]


def with_11_bits(acts: NDArray[np.float32]) -> NDArray[np.float32]:
    mantissa, exponent = np.frexp(acts.astype(np.float64))
    return np.ldexp(np.floor(mantissa * 2048 + 0.5) / 2048, exponent).astype(np.float32)
