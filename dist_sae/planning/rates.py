"""How fast producers and trainers are, by `dist-sae bench` figures or an accelerator's data sheet.

A trainer's step from bench figures of another shape is scaled: its product and selection with the
products' FLOPs, Adam and the norms with the parameters. From data sheets it is

    2 FLOPs per weight met and row / (peak x EFFICIENCY)  +  bytes moved / (bandwidth x BANDWIDTH)
    +  bytes sent / network

None of the accelerator figures below was measured by this project, and no overlap is counted.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dist_sae.config.dictionary import CountsLatentsConfig
from dist_sae.errors import ConfigError
from dist_sae.planning.basis import Basis
from dist_sae.planning.memory import active
from dist_sae.planning.traffic import step_traffic
from dist_sae.training.memory import state_bytes

STEP_EFFICIENCY = 0.5
"""Share of the peak that the encoder product reaches; an assumption."""
FORWARD_EFFICIENCY = 0.35
"""Share of the peak that a language model's forward pass reaches; an assumption."""
BANDWIDTH_EFFICIENCY = 0.7
"""Share of the memory's bandwidth that is reached; an assumption."""
_STATE_PASSES = 9  # over a parameter: gradients are summed, then their norm; Adam reads 4, writes 3
_CODE_PASSES = 4  # over an encoder or decoder row: the code's gradient, decode, both weights'
_FP32 = 4


class Accelerator(NamedTuple):
    """Public figures of a device: its vendor's data sheet, dense, without sparsity."""

    bf16_flops: float
    fp32_flops: float
    memory_bytes: float
    bytes_per_second: float
    """Bandwidth of its memory."""
    source: str


ACCELERATORS = {
    "a100-40g": Accelerator(312e12, 19.5e12, 40e9, 1.555e12, "NVIDIA A100 data sheet, SXM"),
    "a100": Accelerator(312e12, 19.5e12, 80e9, 2.039e12, "NVIDIA A100 80GB data sheet, SXM"),
    "h100": Accelerator(989e12, 67e12, 80e9, 3.35e12, "NVIDIA H100 data sheet, SXM, dense"),
    "h200": Accelerator(989e12, 67e12, 141e9, 4.8e12, "NVIDIA H200 data sheet, SXM, dense"),
    "l40s": Accelerator(362e12, 91.6e12, 48e9, 864e9, "NVIDIA L40S data sheet, dense"),
    "l4": Accelerator(121e12, 30.3e12, 24e9, 300e9, "NVIDIA L4 data sheet, dense"),
}


class Rates(NamedTuple):
    """Rates of single processes; None where nothing is known."""

    step_seconds: float | None = None
    """A training step, of all ranks at once."""
    producer_rows_per_second: float | None = None
    """One producer, with all its ranks."""
    read_bytes_per_second: float | None = None
    """Reads from the store by all trainers together."""
    write_bytes_per_second: float | None = None
    """Writes to the store by all producers together."""
    sources: tuple[str, ...] = ()

    def over(self, other: "Rates") -> "Rates":
        """These rates, and the other's where these have none."""
        known = {key: rate for key, rate in self._asdict().items() if rate is not None}
        return other._replace(**known | {"sources": (*self.sources, *other.sources)})


def step_flops(basis: Basis) -> float:
    """FLOPs of a rank's encoder product in a step."""
    met = basis.run.sae.latents_met / basis.axis.shards
    return 2.0 * basis.replica_rows * met * basis.widths.d_in


def of_accelerator(basis: Basis, name: str, network_bytes_per_second: float) -> Rates:
    """Rates by an accelerator's data sheet.

    Args:
        name: Key of `ACCELERATORS`.
        network_bytes_per_second: That a rank sends.

    Raises:
        ConfigError: There is no such accelerator in the table.
    """
    if name not in ACCELERATORS:
        raise ConfigError(f"--accelerator: {name} is not one of {', '.join(ACCELERATORS)}")
    device, run, widths = ACCELERATORS[name], basis.run, basis.widths
    is_bf16 = run.train.products == "bf16"
    peak = device.bf16_flops if is_bf16 else device.fp32_flops
    products = 2 * step_flops(basis) / (2 * widths.d_in) * (2 if is_bf16 else _FP32)
    state = _STATE_PASSES * state_bytes(run, widths, basis.axis).weights
    codes = basis.replica_rows * active(basis) / basis.axis.shards
    rows = _CODE_PASSES * codes * (widths.d_in + widths.d_out) * _FP32
    moved = (products + state + rows) / (device.bytes_per_second * BANDWIDTH_EFFICIENCY)
    sent = sum(step_traffic(basis).values()) / network_bytes_per_second
    step = step_flops(basis) / (peak * STEP_EFFICIENCY) + moved + sent
    produced = None
    if basis.model.parameters:
        context, lost = run.activations.context_tokens, run.activations.exclude.first_positions
        tokens = context / max(1, context - max(lost, int(run.activations.prepend_bos)))
        flops = 2 * basis.model.parameters * tokens
        forward = device.bf16_flops if run.model.dtype != "fp32" else device.fp32_flops  # type: ignore[union-attr]
        produced = forward * FORWARD_EFFICIENCY * run.tensor_parallel / flops
    said = (
        f"{name}: {device.source}; {STEP_EFFICIENCY} of the peak in products, "
        f"{FORWARD_EFFICIENCY} in the model, {BANDWIDTH_EFFICIENCY} of the bandwidth, "
        f"{network_bytes_per_second / 1e9:g} GB/s between ranks (assumed)"
    )
    return Rates(step, produced, sources=(said,))


def of_bench(basis: Basis, found: Mapping[str, Any], said: str) -> Rates:
    """Rates from the JSON of one `dist-sae bench` of step, produce or store.

    Args:
        said: Where it is from, for people.

    Raises:
        ConfigError: It is the result of something else.
    """
    if {"step_seconds", "product_seconds", "n_latents"} <= found.keys():
        return Rates(_scaled_step(basis, found), sources=(said,))
    if {"rows_per_second", "bare_rows_per_second"} <= found.keys():
        return Rates(None, float(found["rows_per_second"]), sources=(said,))
    if {"write_bytes_per_second", "read_bytes_per_second"} <= found.keys():
        run = basis.run
        read = found["read_bytes_per_second"] * run.processes.trainers
        write = found["write_bytes_per_second"] * run.processes.producers
        return Rates(None, None, read, write, (said,))
    raise ConfigError(f"{said}: is not what bench step, produce or store prints with --json")


def read_bench(paths: Iterable[Path]) -> list[tuple[str, Mapping[str, Any]]]:
    """Read results of `dist-sae bench ... --json`, each with its file's name.

    Raises:
        ConfigError: A file cannot be read, or holds no JSON object.
    """
    found: list[tuple[str, Mapping[str, Any]]] = []
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8").strip().splitlines()[-1])
        except OSError as exc:
            raise ConfigError(f"--bench: {path}: {exc.strerror}; name a readable file") from exc
        except (ValueError, IndexError) as exc:
            content = exc
        if not isinstance(content, dict):
            raise ConfigError(f"--bench: {path}: holds no JSON object; give what --json printed")
        found.append((str(path), content))
    return found


def _scaled_step(basis: Basis, found: Mapping[str, Any]) -> float:
    """Seconds of a step of this shape, from those of another."""
    shape, product = found, found["product_seconds"]
    phases = found.get("phases", {})
    of_state = min(
        found["step_seconds"] - product, sum(phases.get(p, 0.0) for p in ("adam", "norms"))
    )
    rest = found["step_seconds"] - of_state
    experts = shape.get("experts") or 1
    d_in = shape["d_in"] * shape.get("reads", 1)
    rows = shape["batch"] / shape.get("replicas", 1)
    flops = 2 * rows * shape["n_latents"] / experts / shape.get("shards", 1) * d_in
    d_out = shape["d_in"] * (shape.get("writes") or shape.get("reads", 1))
    weights = _FP32 * shape["n_latents"] / shape.get("shards", 1) * (d_in + d_out)
    own = state_bytes(basis.run, basis.widths, basis.axis).weights
    scaled: float = rest * step_flops(basis) / flops + of_state * own / weights
    return scaled


def bench_shape(basis: Basis) -> dict[str, Any]:
    """Arguments of `bench.step.StepShape` for one rank's work in a step of this run."""
    run, sae, shards = basis.run, basis.run.sae, basis.axis.shards
    own = {
        "kind",
        "n_latents",
        "k",
        "init",
        "dead_after_rows",
        "reads",
        "writes",
        "experts",
        "auxk",
    }
    given = sae.model_dump(mode="json", exclude=own, exclude_none=True, exclude_defaults=True)
    return {
        "d_in": max(basis.model.widths.values()),
        "n_latents": sae.n_latents // shards,
        "k": sae.k if isinstance(sae, CountsLatentsConfig) else 1,
        "batch": basis.replica_rows,
        "products": run.train.products,
        "kernels": run.train.kernels,
        "kind": sae.kind,
        "experts": sae.n_experts // shards if sae.n_experts else None,
        "reads": len(run.reads),
        "writes": 0 if run.reads == run.writes else len(run.writes),
        "settings": tuple(f"{key}={json.dumps(value)}" for key, value in given.items()),
    }
