"""Listing, verification and conversion of a run's checkpoints."""

import json
from pathlib import Path
from typing import Any

from dist_sae.checkpoint import warm_start
from dist_sae.checkpoint.layout import Checkpoint, Checkpoints
from dist_sae.checkpoint.piecewise import safetensors_pieces, stored_tensor
from dist_sae.checkpoint.state import is_moment
from dist_sae.checkpoint.trained import open_step, trained_run
from dist_sae.config import Run
from dist_sae.errors import ConfigError, CorruptObjectError, ObjectNotFoundError
from dist_sae.storage import open_store


def ls(run: Run) -> dict[str, Any]:
    """List checkpoints, oldest first. `damaged` lists the steps with a damaged manifest.

    Raises:
        PlanMismatchError: The checkpoints are from a run with other settings.
    """
    checkpoints, listed, damaged = _open(run), [], []
    for step in checkpoints.steps():
        try:
            checkpoint = checkpoints.open(step)
        except CorruptObjectError:
            damaged.append(step)
            continue
        tensors, own = checkpoint.manifest.tensors, trained_run(checkpoint, run)
        listed.append(
            {
                "step": step,
                "rows": step * own.train.batch_rows,
                "n_latents": tensors["W_enc"].shape[0],
                "parts": sum(len(tensor.parts) for tensor in tensors.values()),
                "bytes": sum(part.bytes for tensor in tensors.values() for part in tensor.parts),
            }
        )
    return {"checkpoints": listed, "damaged": damaged}


def verify(run: Run) -> dict[str, Any]:
    """Read every part of every checkpoint once, and check that no rows are missing.

    Returns:
        Numbers of `checkpoints`, `parts` and `bytes` that were read. `bad` is the number of
        errors, and `bad_objects` has the errors by step and tensor.
    """
    checkpoints = _open(run)
    n_parts = n_bytes = 0
    bad: dict[str, str] = {}
    steps = checkpoints.steps()
    for step in steps:
        try:
            checkpoint = checkpoints.open(step)
        except CorruptObjectError as exc:
            bad[f"step {step}"] = str(exc)
            continue
        for name, tensor in checkpoint.manifest.tensors.items():
            n_parts += len(tensor.parts)
            n_bytes += sum(part.bytes for part in tensor.parts)
            try:
                checkpoint.check(name)
            except (CorruptObjectError, ObjectNotFoundError) as exc:
                bad[f"step {step}, {name}"] = str(exc)
    numbers = {"checkpoints": len(steps), "parts": n_parts, "bytes": n_bytes}
    return {**numbers, "bad": len(bad), "bad_objects": bad}


def convert(run: Run, output: Path, *, step: int | None, moments: bool) -> dict[str, Any]:
    """Write a checkpoint to a local safetensors file with whole tensors.

    Names, orientation and scale are those of training. (To get files that SAELens loads, use
    `dist-sae export`.) The file's metadata contain the step and all scalars as JSON. The file
    appears only when it is complete. No tensor is ever in memory as a whole.

    Args:
        run: The run.
        output: Path of the file.
        step: Step of the checkpoint. The newest if None.
        moments: Whether to write the optimizer's moments too, which makes the file three times as
            large.

    Raises:
        ConfigError: There is no checkpoint of that step.
        PlanMismatchError: The checkpoint is from a run with other settings.
        CorruptObjectError: The checkpoint is damaged.
        StoreError: The file cannot be written.
    """
    checkpoints = _open(run)
    checkpoint = _chosen(run, checkpoints, step)
    names = [name for name in checkpoint.manifest.tensors if moments or not is_moment(name)]
    tensors = [stored_tensor(checkpoint, name) for name in names]
    metadata = {"step": str(checkpoint.step), "scalars": json.dumps(checkpoint.scalars)}
    here = open_store(str(output.absolute().parent))
    here.put_stream(output.name, lambda: safetensors_pieces(tensors, metadata))
    return {"step": checkpoint.step, "tensors": len(tensors), "output": str(output)}


def convert_to_run(run: Run, other: Run, *, step: int | None) -> dict[str, Any]:
    """Copy a checkpoint's dictionary for another run to start from. That run may be wider.

    Raises:
        ConfigError: There is no checkpoint of that step, or the other run cannot start from it.
        PlanMismatchError: The checkpoint is from a run with other settings.
    """
    checkpoint = _chosen(run, _open(run), step)
    copied = warm_start.prepare(checkpoint, open_store(other.store.runs, other.store.s3), other)
    return {
        "step": checkpoint.step,
        "known_latents": warm_start.width(checkpoint),
        "new_latents": other.sae.n_latents - warm_start.width(checkpoint),
        "bytes": copied,
        "run": other.name,
    }


def _chosen(run: Run, checkpoints: Checkpoints, step: int | None) -> Checkpoint:
    place = f"{run.store.runs}/{run.name}"
    checkpoint = checkpoints.latest() if step is None else open_step(checkpoints, step, place)
    if checkpoint is None:
        raise ConfigError(f"{place}: has no complete checkpoint")
    trained_run(checkpoint, run)
    return checkpoint


def _open(run: Run) -> Checkpoints:
    runs = open_store(run.store.runs, run.store.s3)
    return Checkpoints(runs, run.name, run.train.keep_checkpoints)
