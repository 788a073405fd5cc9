"""Stage `speed`: step vs. product, memory beyond the state, and routed vs. exact."""

from collections.abc import Iterator

from dist_sae.bench.gpu_check.stage import Record, StageContext, measurement
from dist_sae.bench.step import StepShape, bench_routed, bench_step, step_mesh

_GOALS = {(768, 65_536): 2.8, (4096, 131_072): 2.0}
"""Goals for step / product time on an H100, by d_in and n_latents."""


def speed(context: StageContext) -> Iterator[Record]:
    """Measure steps of DeepSpeed's engine, on one rank. On a GPU the rank uses NCCL."""
    batch, rounds = (64, 1) if context.is_dry else (16_384, 5)
    for d_in, n_latents in [(16, 256)] if context.is_dry else _GOALS:
        shape = StepShape(d_in, n_latents, k=8 if context.is_dry else 32, batch=batch)
        yield _step(shape, rounds)
    wide = 256 if context.is_dry else 262_144
    shape = StepShape(16 if context.is_dry else 768, wide, 8, batch, kind="routed", experts=16)
    with step_mesh(shape) as mesh:
        found = bench_routed(shape, mesh, rounds=rounds)
    kept = ("exact_seconds", "routed_seconds", "speedup", "expert_load_ratio")
    yield measurement(f"routed, {wide} latents", **{name: found[name] for name in kept})


def _step(shape: StepShape, rounds: int) -> Record:
    with step_mesh(shape) as mesh:
        found = bench_step(shape, mesh, rounds=rounds)
    kept = ("step_seconds", "product_seconds", "product_chunk", "ratio", "ratio_low", "ratio_high")
    numbers = {name: found[name] for name in (*kept, "beyond_state_bytes", "phases")}
    goal = _GOALS.get((shape.d_in, shape.n_latents))
    return measurement(f"step, {shape.d_in} x {shape.n_latents}", goal=goal, **numbers)
