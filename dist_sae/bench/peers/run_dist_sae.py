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
from dist_sae.parallel.mesh import join_mesh


def main() -> int:
    """Train as the spec says; measure."""
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
    with join_mesh(1) as mesh:
        step = TrainingStep(shape, mesh)
        step.initialise(batches.read(0))
        for x in batches:
            step(x)
        batches.finish()
        fvu = heldout_fvu(spec, step.reconstruct, scale)
    notes = [] if not spec.bf16 else ["this is how dist_sae is shipped"]
    print_result(spec, batches, __version__, notes, fvu)
    return 0


if __name__ == "__main__":
    sys.exit(main())
