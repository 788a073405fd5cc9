"""Stage `ranks`: two ranks on one device (gloo) vs. one rank, and NCCL with one rank."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist

from dist_sae.bench.gpu_check.recipes import (
    PlainStep,
    Trained,
    difference,
    shape_of,
    to_device,
    train,
)
from dist_sae.bench.gpu_check.stage import Record, StageContext, comparison, measurement
from dist_sae.bench.step import StepShape, TrainingStep, random_batches
from dist_sae.dictionaries.interface import Rows
from dist_sae.distributed.local_ranks import rank_environments
from dist_sae.distributed.mesh import SINGLE_PROCESS, Mesh, join_mesh
from dist_sae.distributed.rendezvous import rendezvous

_BOUND = 1e-3
"""Largest relative difference of the FVU. Near ties select different latents, as in `recipes`."""
_LIMIT_SECONDS = 600.0  # a fallback: the stage has its own limit
LAYOUTS = {"1 x 2, topk": ("topk", 2), "1 x 2, routed": ("routed", 2), "2 x 1, topk": ("topk", 1)}
"""Recipe and number of latent shards, by name. The layout with two replicas uses DeepSpeed. It is
last because DeepSpeed keeps the process groups of its first mesh."""


def ranks(context: StageContext) -> Iterator[Record]:
    """Compare the FVUs of two ranks with the FVUs of one rank that has all rows."""
    steps = _steps(context)
    alone = SINGLE_PROCESS._replace(device=context.device)
    expected = {
        name: train(shape_of(kind, dry=context.is_dry), alone, steps)
        for name, (kind, _) in LAYOUTS.items()
    }
    command = [sys.executable, "-m", "dist_sae.bench.gpu_check", "--device", context.device.type]
    command += ["--rank-of", "ranks"]
    children = [
        subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True)
        for environment in rank_environments(2, 2)
    ]
    try:
        out, _ = children[0].communicate(timeout=_LIMIT_SECONDS)
    finally:
        for child in children:
            child.kill()
            child.wait()
    if children[0].returncode:
        raise RuntimeError(
            f"rank 0 exited with code {children[0].returncode}; see its output above"
        )
    found = json.loads(out.splitlines()[-1])
    for name, fvus in found.items():
        yield comparison(
            f"{name}: compared with one rank", difference(Trained(fvus, []), expected[name]), _BOUND
        )
    if not context.is_dry:
        yield _nccl()


def run_rank(context: StageContext) -> None:
    """Train as one of two ranks in every layout. Rank 0 prints the FVUs."""
    found = {}
    with rendezvous(2, _LIMIT_SECONDS) as joined:
        for name, (kind, shards) in LAYOUTS.items():
            own = joined._replace(generation=f"{joined.generation}/{name}")
            with join_mesh(own, shards, shared_by_all=context.device) as mesh:
                found[name] = _train(shape_of(kind, dry=context.is_dry), mesh, _steps(context))
    if joined.rank == 0:
        sys.stdout.write(json.dumps(found) + "\n")


def _steps(context: StageContext) -> int:
    return 3 if context.is_dry else 10


def _train(shape: StepShape, mesh: Mesh, steps: int) -> list[float]:
    """Make the steps of `recipes.train` on this rank's half of the rows. Returns their FVUs."""
    kind = PlainStep if mesh.axis.replicas == 1 else TrainingStep
    step = kind(shape, mesh)
    batches = [
        _half(to_device(rows, mesh), mesh) for rows in random_batches(shape, SINGLE_PROCESS, 2)
    ]
    step.initialise(batches[0])
    fvus = []
    for number in range(steps):
        share = torch.tensor(step(batches[number % 2]))  # a replica's FVU is a sum over its ranks
        fvus.append(float(mesh.axis.total(share)) / mesh.axis.replicas)
    return fvus


def _half(rows: Rows, mesh: Mesh) -> Rows:
    inputs, targets = (part.chunk(mesh.world)[mesh.rank] for part in rows)
    return Rows(inputs, inputs if rows.inputs is rows.targets else targets)


def _nccl() -> Record:
    """Check each collective of a step with one rank, which is all of NCCL that one GPU can test."""
    with rendezvous(1) as alone, join_mesh(alone) as mesh:
        x = torch.arange(8.0, device=mesh.device)
        gathered, scattered, exchanged = (torch.empty_like(x) for _ in range(3))
        dist.all_gather_into_tensor(gathered, x)
        dist.reduce_scatter_tensor(scattered, x)
        dist.all_to_all_single(exchanged, x)
        summed = x.clone()
        dist.all_reduce(summed)
        same = all(torch.equal(x, y) for y in (gathered, scattered, exchanged, summed))
        return measurement("NCCL with one rank", backend=dist.get_backend()) | {"ok": same}
