"""Runner for dist_sae itself, under the same protocol as the peers."""

import sys

from dist_sae import __version__
from dist_sae.bench.peers.protocol import (
    Batches,
    common_scale,
    heldout_fvu,
    print_result,
    read_spec,
)
from dist_sae.bench.step import StepShape, TrainingStep
from dist_sae.dictionaries.init import initialise_from_data
from dist_sae.dictionaries.interface import Rows
from dist_sae.distributed.mesh import join_mesh
from dist_sae.distributed.rendezvous import rendezvous


def main() -> int:
    """Train and measure by the spec."""
    spec = read_spec()
    scale = common_scale(spec)
    batches = Batches(spec, scale)
    shape = StepShape(
        spec.d_in,
        spec.n_latents,
        spec.k,
        spec.batch,
        products="bf16" if spec.bf16 else "fp32",
        lr=spec.lr,
        seed=spec.seed,
    )
    with rendezvous(1) as ranks, join_mesh(ranks) as mesh:
        step = TrainingStep(shape, mesh)
        step.initialise(batches.read(0))
        n_batches = -(-spec.n_latents // spec.batch)
        from_data = n_batches <= spec.steps  # in short speed runs the directions do not matter
        if from_data:
            first = map(batches.read, range(n_batches))
            initialise_from_data(step.sae, (Rows(x, x) for x in first))
        for x in batches:
            step(x)
        batches.finish()
        fvu = heldout_fvu(spec, step.reconstruct, scale)
    notes = ["initial directions from the data, as dist_sae is shipped"] if from_data else []
    if spec.bf16:
        notes.append("this is how dist_sae is shipped")
    print_result(spec, batches, __version__, notes, fvu)
    return 0


if __name__ == "__main__":
    sys.exit(main())
