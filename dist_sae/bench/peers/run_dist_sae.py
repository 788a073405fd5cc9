"""Runner for dist_sae itself, under the same protocol as the peers."""

import sys
from functools import partial

from dist_sae import __version__
from dist_sae.bench.peers.protocol import Batches, Spec, Trained, measure
from dist_sae.bench.step import StepShape, TrainingStep
from dist_sae.dictionaries.init import initialise_from_data
from dist_sae.dictionaries.interface import Rows
from dist_sae.distributed.mesh import Mesh, join_mesh
from dist_sae.distributed.rendezvous import rendezvous


def train(mesh: Mesh, spec: Spec, batches: Batches) -> Trained:
    """Train a dictionary with the spec's settings."""
    shape = StepShape(
        spec.d_in,
        spec.n_latents,
        spec.k,
        spec.batch,
        products="bf16" if spec.bf16 else "fp32",
        kind="transcoder" if spec.transcoder else "topk",
        writes=1 if spec.transcoder else 0,
        lr=spec.lr,
        seed=spec.seed,
    )
    step = TrainingStep(shape, mesh)
    step.initialise(Rows(*spec.split(batches.read(0))))
    n_batches = -(-spec.n_latents // spec.batch)
    from_data = n_batches <= spec.steps  # speed runs are too short, and do not need it
    if from_data:
        some = map(batches.read, range(n_batches))
        initialise_from_data(step.sae, (Rows(*spec.split(rows)) for rows in some))
    for rows in batches:
        step(Rows(*spec.split(rows)))
    notes = ["initial directions from the data, the default of dist_sae"] if from_data else []
    if spec.bf16:
        notes.append("the default settings of dist_sae")
    return step.reconstruct, notes


if __name__ == "__main__":
    with rendezvous(1) as ranks, join_mesh(ranks) as mesh:
        sys.exit(measure(__version__, partial(train, mesh)))
