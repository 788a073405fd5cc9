"""Speed of producers and trainers, from `dist-sae bench` figures or an accelerator's data sheet.

A bench result for another shape is scaled: its product and selection by the products' FLOPs, and
Adam and the norms by the number of parameters. From a data sheet, a training step takes

    2 FLOPs per row and weight it meets / (peak x STEP_EFFICIENCY)
    +  bytes moved / (memory bandwidth x BANDWIDTH_EFFICIENCY)  +  bytes sent / network bandwidth

This assumes no overlap of the three. This project has measured none of the accelerator figures
below. Jobs of a sweep that share ranks make their steps one after the other.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dist_sae.errors import ConfigError
from dist_sae.planning.sizes import RunSizes
from dist_sae.planning.traffic import step_traffic

STEP_EFFICIENCY = 0.5
"""Share of the peak FLOPs that the encoder product reaches; an assumption."""
FORWARD_EFFICIENCY = 0.35
"""Share of the peak FLOPs that a language model's forward pass reaches; an assumption."""
BANDWIDTH_EFFICIENCY = 0.7
"""Share of the memory bandwidth that is reached; an assumption."""
# accesses per parameter: 1 to sum gradients, 1 for their norm, 4 reads and 3 writes by Adam
_STATE_PASSES = 9
# accesses per active encoder or decoder row: the code's gradient, decoding, both weights' gradients
_CODE_PASSES = 4
_FP32 = 4


class Accelerator(NamedTuple):
    """Figures of a device from its vendor's data sheet, without sparsity."""

    bf16_flops: float
    fp32_flops: float
    memory_bytes: float
    bytes_per_second: float
    """Memory bandwidth."""
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
    """Speeds of single processes. An unknown speed is None."""

    step_seconds: float | None = None
    """Time of a training step of all ranks together, averaged over the run."""
    producer_rows_per_second: float | None = None
    """Speed of one producer with all its ranks."""
    read_bytes_per_second: float | None = None
    """Speed of reads from the store by all trainers together."""
    write_bytes_per_second: float | None = None
    """Speed of writes to the store by all producers together."""
    trainer_begin_seconds: float | None = None
    """Time of a trainer outside its steps: from its start to the first step, and at its end."""
    producer_begin_seconds: float | None = None
    """Time from a producer's start to its first unit."""
    sources: tuple[str, ...] = ()

    def filled_from(self, other: "Rates") -> "Rates":
        """Return these rates, with unknown ones taken from `other`."""
        known = {key: rate for key, rate in self._asdict().items() if rate is not None}
        return other._replace(**known | {"sources": (*self.sources, *other.sources)})


def step_flops(sizes: RunSizes) -> float:
    """Return the FLOPs of a rank's encoder product in a step."""
    met = sizes.run.sae.preacts_per_row / sizes.axis.shards
    return 2.0 * sizes.replica_rows * met * sizes.widths.d_in


def slowest(groups: Sequence[Sequence[RunSizes]], step: Callable[[RunSizes], float]) -> float:
    """Return the slowest group's step time, given each job's. Jobs in a group take turns."""
    return max(sum(map(step, group)) for group in groups)


def rates_from_data_sheet(
    groups: Sequence[Sequence[RunSizes]], name: str, network_bytes_per_second: float
) -> Rates:
    """Compute rates from an accelerator's data sheet.

    Args:
        groups: A run; or the jobs of a sweep, grouped by shared ranks.
        name: Key of `ACCELERATORS`.
        network_bytes_per_second: Network bandwidth with which a rank sends.

    Raises:
        ConfigError: The table has no accelerator with this name.
    """
    if name not in ACCELERATORS:
        raise ConfigError(f"--accelerator: {name} is not one of {', '.join(ACCELERATORS)}")
    device, sizes = ACCELERATORS[name], groups[0][0]

    def step(job: RunSizes) -> float:
        widths, is_bf16 = job.widths, job.run.train.products == "bf16"
        peak = device.bf16_flops if is_bf16 else device.fp32_flops
        products = step_flops(job) / widths.d_in * (2 if is_bf16 else _FP32)
        state = _STATE_PASSES * job.state.weights
        codes = job.replica_rows * job.active / job.axis.shards
        rows = _CODE_PASSES * codes * (widths.d_in + widths.d_out) * _FP32
        moved = (products + state + rows) / (device.bytes_per_second * BANDWIDTH_EFFICIENCY)
        sent = sum(step_traffic(job).values()) / network_bytes_per_second
        return step_flops(job) / (peak * STEP_EFFICIENCY) + moved + sent

    produced, model, activations = None, sizes.run.model, sizes.run.activations
    if sizes.model.parameters:
        context, lost = activations.context_tokens, activations.exclude.first_positions
        tokens = context / max(1, context - max(lost, int(activations.prepend_bos)))
        is_fp32 = model.kind == "huggingface" and model.dtype == "fp32"
        forward = device.fp32_flops if is_fp32 else device.bf16_flops
        flops = forward * FORWARD_EFFICIENCY * sizes.run.tensor_parallel
        produced = flops / (2 * sizes.model.parameters * tokens)
    source = (
        f"{name}: {device.source}; assumed: {STEP_EFFICIENCY} of the peak FLOPs in products, "
        f"{FORWARD_EFFICIENCY} in the model, {BANDWIDTH_EFFICIENCY} of the memory bandwidth, "
        f"{network_bytes_per_second / 1e9:g} GB/s between ranks"
    )
    return Rates(slowest(groups, step), produced, sources=(source,))


def rates_from_bench(
    groups: Sequence[Sequence[RunSizes]], result: Mapping[str, Any], source: str
) -> Rates:
    """Compute rates from the JSON result of one `dist-sae bench` of step, produce or store.

    Args:
        groups: See `rates_from_data_sheet`.
        result: The result.
        source: Source of the result, for people.

    Raises:
        ConfigError: The JSON is not a result of one of these.
    """
    if {"step_seconds", "product_seconds", "n_latents"} <= result.keys():
        return Rates(slowest(groups, lambda job: scaled_step(job, result)), sources=(source,))
    if {"rows_per_second", "bare_rows_per_second"} <= result.keys():
        return Rates(None, float(result["rows_per_second"]), sources=(source,))
    if {"write_bytes_per_second", "read_bytes_per_second"} <= result.keys():
        ranks = sum(group[0].run.processes.trainers for group in groups)
        read = result["read_bytes_per_second"] * ranks
        write = result["write_bytes_per_second"] * groups[0][0].run.processes.producers
        return Rates(None, None, read, write, sources=(source,))
    raise ConfigError(f"{source}: is not the --json output of bench step, produce or store")


def read_bench(paths: Iterable[Path]) -> list[tuple[str, Mapping[str, Any]]]:
    """Read results of `dist-sae bench ... --json`. Returns each with the name of its file.

    Raises:
        ConfigError: A file cannot be read, or its last line is not a JSON object.
    """
    found: list[tuple[str, Mapping[str, Any]]] = []
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8").strip().splitlines()[-1])
        except OSError as exc:
            raise ConfigError(f"--bench: {path}: {exc.strerror}; pass a readable file") from exc
        except (ValueError, IndexError):
            content = None
        if not isinstance(content, dict):
            raise ConfigError(
                f"--bench: {path}: does not contain a JSON object; pass a file that --json printed"
            )
        found.append((str(path), content))
    return found


def scaled_step(sizes: RunSizes, result: Mapping[str, Any]) -> float:
    """Scale the step time of a `bench step` result to this run's shape."""
    phases, whole = result.get("phases", {}), result["step_seconds"]
    of_state = sum(phases.get(phase, 0.0) for phase in ("adam", "norms"))
    of_state = min(whole - result["product_seconds"], of_state)
    reads, shards = result.get("reads", 1), result.get("shards", 1)
    rows, latents = result["batch"] / result.get("replicas", 1), result["n_latents"] / shards
    flops = 2 * rows * latents / (result.get("experts") or 1) * result["d_in"] * reads
    weights = _FP32 * latents * result["d_in"] * (reads + (result.get("writes") or reads))
    own = sizes.state.weights
    scaled: float = (whole - of_state) * step_flops(sizes) / flops + of_state * own / weights
    return scaled
