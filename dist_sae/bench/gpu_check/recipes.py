"""Stage `recipes`: training steps of every recipe, on the CPU and twice on the device."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dist_sae.bench.gpu_check.stage import Record, StageContext, comparison
from dist_sae.bench.step import StepShape, TrainingStep, random_batches
from dist_sae.config import Run
from dist_sae.config.messages import sections_by_kind
from dist_sae.dictionaries.interface import Rows
from dist_sae.distributed.engine import Engine
from dist_sae.distributed.mesh import SINGLE_PROCESS, Mesh

_LOSS_BOUND = 1e-3
"""Largest relative difference of the FVU. The device sums products in another order, so near ties
select different latents."""
_SITES = {
    "transcoder": (1, 1),
    "crosscoder": (2, 0),
    "crosscoder_relu": (2, 0),
    "clt": (2, 2),
    "clt_jumprelu": (2, 2),
}
"""Numbers of sites read, and of other sites written, for recipes where they are not 1 and 0."""


class PlainStep(TrainingStep):
    """A training step in plain torch, on any device, without process groups."""

    def build_engine(self) -> Engine:
        return Engine(self.run, self.sae)


class Trained(NamedTuple):
    """FVU of every step, and the parameters after the last one."""

    fvus: list[float]
    parameters: list[Tensor]


def recipes(context: StageContext) -> Iterator[Record]:
    """Compare every step's FVU with the CPU's. A second run must give bitwise equal weights."""
    steps = 3 if context.is_dry else 20
    here = SINGLE_PROCESS._replace(device=context.device)
    for kind in sections_by_kind(Run.model_fields["sae"].annotation):
        shape = shape_of(kind, dry=context.is_dry)
        on_cpu, first, second = (train(shape, mesh, steps) for mesh in (SINGLE_PROCESS, here, here))
        error = difference(first, on_cpu)
        yield comparison(
            f"{kind}: {steps} steps compared with the CPU", error, _LOSS_BOUND, fvu=first.fvus[-1]
        )
        pairs = zip(first.parameters, second.parameters, strict=True)
        other = sum(not torch.equal(one, two) for one, two in pairs)
        yield comparison(f"{kind}: the same steps twice, bitwise", other, 0)


def shape_of(kind: str, *, dry: bool) -> StepShape:
    """Return the shape of a small dictionary of a recipe, in which some latents soon die."""
    reads, writes = _SITES.get(kind, (1, 0))
    d_in, n_latents, k, batch = (16, 64, 4, 64) if dry else (256, 4096, 16, 1024)
    return StepShape(
        d_in,
        n_latents,
        k,
        batch,
        products="fp32",
        kind=kind,
        experts=4 if kind == "routed" else None,
        reads=reads,
        writes=writes,
        settings=(f"dead_after_rows={2 * batch}",),
        lr=1e-3,
    )


def train(shape: StepShape, mesh: Mesh, steps: int) -> Trained:
    """Train for some steps, from weights initialized on the CPU."""
    batches = random_batches(shape, SINGLE_PROCESS, 2)
    start = PlainStep(shape, SINGLE_PROCESS)
    start.initialise(batches[0])
    step = PlainStep(shape, mesh)
    here = [to_device(rows, mesh) for rows in batches]
    step.initialise(here[0])
    step.sae.load_state_dict(start.sae.state_dict())
    fvus = [step(here[number % 2]) for number in range(steps)]
    return Trained(fvus, [parameter.detach().cpu() for parameter in step.sae.parameters()])


def to_device(rows: Rows, mesh: Mesh) -> Rows:
    """Copy rows to a mesh's device. Targets that are the inputs remain the same tensor."""
    inputs = rows.inputs.to(mesh.device)
    same = rows.targets is rows.inputs
    return Rows(inputs, inputs if same else rows.targets.to(mesh.device))


def difference(one: Trained, other: Trained) -> float:
    """Return the largest relative difference of the FVU over all steps."""
    pairs = zip(one.fvus, other.fvus, strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)
