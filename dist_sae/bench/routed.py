"""`dist-sae bench routed`: a routed step against an exact one of the same width."""

import statistics
from functools import partial
from typing import Any

import torch

from dist_sae.bench.step import StepShape, TrainingStep, seconds
from dist_sae.distributed.mesh import Mesh


def bench_routed(shape: StepShape, mesh: Mesh, *, rounds: int) -> dict[str, Any]:
    """Time steps of both in turn; both dictionaries and their Adam states are in memory at once.

    Returns:
        Medians over `rounds`: `exact_seconds`, `routed_seconds`; `speedup`, the first over the
        second, with its quartiles `speedup_low` and `speedup_high`; `expert_load_ratio`, rows of
        the busiest expert over the mean.
    """
    generator = torch.Generator().manual_seed(shape.seed)
    batches = [torch.randn(shape.batch, shape.d_in, generator=generator) for _ in range(2)]
    batches = [x.to(mesh.device) for x in batches]
    exact = TrainingStep(shape._replace(experts=None), mesh)
    routed = TrainingStep(shape, mesh)
    for step in (exact, routed):
        step.initialise(batches[0])
        for x in batches:
            step(x)  # warm-up: makes Adam's moments and maps memory
    pairs = []
    for number in range(rounds):
        x = batches[number % 2]
        pairs.append((seconds(partial(exact, x), mesh), seconds(partial(routed, x), mesh)))
    ratios = sorted(slow / fast for slow, fast in pairs)
    return {
        **shape._asdict(),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "exact_seconds": statistics.median(slow for slow, _ in pairs),
        "routed_seconds": statistics.median(fast for _, fast in pairs),
        "speedup": statistics.median(ratios),
        "speedup_low": ratios[rounds // 4],
        "speedup_high": ratios[-1 - rounds // 4],
        "expert_load_ratio": routed.load_ratio,
    }
