"""One rank of a job that trains every recipe on the same batches and saves the results."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from dist_sae.config import Run, load_run
from dist_sae.config.sae import SaeConfig
from dist_sae.dictionaries.dead import DeadLatents
from dist_sae.dictionaries.ema import WeightAverage
from dist_sae.dictionaries.interface import StepContext
from dist_sae.distributed import gradients
from dist_sae.distributed.engine import DeepSpeedEngine
from dist_sae.distributed.mesh import Mesh, join_mesh
from dist_sae.distributed.rendezvous import rendezvous
from dist_sae.kernels import Entries
from dist_sae.kernels.choice import choose_kernels
from tests.dictionaries.recipes import D_IN, LAYERS, make, sae_rows
from tests.runs import write_run

N_LATENTS, BATCH, DEAD_AFTER = 64, 32, 48
# at 3e-3, rounding alone changes the other recipes' loss by 1.2e-6 within 106 steps
LR = dict.fromkeys(("topk", "multi-topk", "batchtopk", "matryoshka", "transcoder", "clt"), 3e-3)
LR |= dict.fromkeys(("routed", "relu", "jumprelu", "to_target", "jumprelu_tanh"), 1e-3)
LR |= dict.fromkeys(("crosscoder", "clt_jumprelu"), 1e-3)
# In these recipes, half of all (row, latent) pairs are active. So if the last bit of one weight
# decides between two bf16 values, a step's loss changes by 8e-6. At these rates, that does not
# happen within 16 steps.
LR |= {"gated": 5e-4, "crosscoder_relu": 7e-4}
RECIPES: dict[str, dict[str, Any]] = {
    "topk": {"k": 4, "auxk": 8, "auxk_coefficient": 0.25},
    "batchtopk": {"k": 4, "auxk": 8, "auxk_coefficient": 0.25},
    "multi-topk": {"kind": "topk", "k": 4, "multi_factor": 3, "auxk": 8, "auxk_coefficient": 0.25},
    "matryoshka": {"k": 4, "prefixes": [0.25, 0.5], "auxk": 8, "auxk_coefficient": 0.25},
    "routed": {"k": 4, "experts": 8, "auxk": 8, "auxk_coefficient": 0.25},
    "transcoder": {"k": 4, "auxk": 8, "auxk_coefficient": 0.25, "skip": True},
    "jumprelu": {"sparsity": 0.02, "initial_threshold": 0.2, "bandwidth": 0.2},
    "to_target": {"kind": "jumprelu", "target_l0": 5.5, "initial_threshold": 0.2, "bandwidth": 0.2},
    "jumprelu_tanh": {"pre_act": 0.01},
    "crosscoder": {"k": 4, "auxk": 8, "weighting": "l1", "shared_latents": 0.1, "reads": LAYERS},
    "crosscoder_relu": {
        "initial_l0": 32,
        "weighting": "l1",
        "shared_latents": 0.1,
        "reads": LAYERS,
    },
    "relu": {"initial_l0": 32},  # half of the latents, so every shard computes densely
    "gated": {"initial_l0": 32},
    "clt": {"k": 4, "auxk": 8, "auxk_coefficient": 0.25, "reads": LAYERS},
    "clt_jumprelu": {"sparsity": 0.02, "initial_threshold": 0.2, "bandwidth": 0.2, "reads": LAYERS},
}


class Watch:
    """A `combine` kernel that records the entries of each reconstruction."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, coefficients: Tensor, entries: Entries, W: Tensor) -> Tensor:
        self.seen.append((entries.rows, entries.latents))
        result: Tensor = self.inner(coefficients, entries, W)
        return result


def train_rank(spec: dict[str, Any], env: dict[str, str], log: str) -> None:
    os.environ.update(env)
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    for number in (1, 2):
        os.dup2(file, number)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = {}
    gradients.MAX_BYTES_SHARE = 1.0  # so that even these small batches exchange gradients by entry
    with rendezvous(spec["world"]) as ranks, join_mesh(ranks, spec["shards"]) as mesh:
        path = write_run(
            Path(spec["out"]).parent / f"rank-{mesh.rank}",
            train={"batch_rows": BATCH, "deepspeed": spec["deepspeed"]},
            processes={"trainers": spec["world"], "latent_shards": spec["shards"]},
        )
        run = load_run(path)
        for kind in spec["kinds"]:
            for dtype in spec["dtypes"]:
                results[kind, dtype] = trained(spec, run, kind, dtype, mesh)
    torch.save(results, f"{spec['out']}.{mesh.rank}")


def trained(
    spec: dict[str, Any], run: Run, kind: str, precision: str, mesh: Mesh
) -> dict[str, Any]:
    dtype = torch.float64 if precision == "fp64" else torch.float32
    config = {"kind": kind, "n_latents": N_LATENTS, "dead_after_rows": DEAD_AFTER} | RECIPES[kind]
    sae_config: SaeConfig = TypeAdapter(SaeConfig).validate_python(config)
    run = run.model_copy(update={"sae": sae_config})  # its sites need not exist
    sae = make(run.sae, dtype, mesh.axis)
    if precision == "bf16":
        sae.product_dtype = torch.bfloat16
    kernels = choose_kernels("auto", mesh.device)
    watch = Watch(kernels.combine)
    sae.kernels = kernels._replace(combine=watch)
    generator = torch.Generator().manual_seed(5)
    batches = [
        (2 * torch.randn(BATCH, D_IN, generator=generator, dtype=torch.float64)).to(dtype)
        for _ in range(spec["steps"][precision])
    ]
    own = slice(mesh.rank * BATCH // mesh.world, (mesh.rank + 1) * BATCH // mesh.world)
    sae.initialise(sae_rows(batches[0][own]), 3)
    engine = DeepSpeedEngine(run, sae, mesh)
    dead = DeadLatents(len(sae.W_enc), DEAD_AFTER, mesh.axis, layers=sae.layers)
    average = WeightAverage(sae, 0.9)
    steps = []
    for number, batch in enumerate(batches):
        watch.seen.clear()
        now = StepContext(4.0 * D_IN, dead.mask, dead.count, progress=number / len(batches))
        output = engine.objective(sae_rows(batch[own]), now)
        engine.backward(output.terms.total)
        [norm] = engine.step(lr=LR[kind])
        dead.update(output.fired, BATCH)
        if dead.n_stuck:
            engine.revive(dead.stuck, batch[own], output.error)
        average.update(sae_rows(batch[own]), number / len(batches))
        n_rows = BATCH // mesh.axis.replicas  # the entries of AuxK are rows n_rows to 2 n_rows
        first_row = mesh.axis.replica * n_rows
        # with several layers, a latent has (layers + 1) / 2 vectors on average, a row one per layer
        n_vectors, first_vector = ((sae.layers + 1) * n // 2 for n in (N_LATENTS, sae.first_latent))
        steps.append(
            {
                "terms": [float(t) for t in output.terms],
                "norm": norm,
                "selected": [
                    # in the routed recipe, rows are ordered by expert, so only latents are compared
                    (0 if kind == "routed" else row * n_vectors) + vectors + first_vector
                    for places, vectors in watch.seen
                    for rows in [places // sae.layers]
                    for row in [rows // n_rows * BATCH + rows % n_rows + first_row]
                ],
                "dead": dead.mask,
            }
        )
    tensors = {n: p.detach() for n, p in sae.named_parameters()}
    average.measure()
    tensors |= {f"ema.{n}": average.mean[n] for n, _ in sae.named_parameters()}
    buffers = dict(sae.named_buffers())
    buffers |= {f"ema.{n}": average.mean[n] for n in buffers}
    tensors |= {
        f"exp_avg_sq.{n}": engine.moment(p, "exp_avg_sq") for n, p in sae.named_parameters()
    }
    return {"steps": steps, "tensors": tensors, "buffers": buffers}
