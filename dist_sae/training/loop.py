"""`dist-sae train`: the training loop of one rank."""

import threading
from collections.abc import Sequence
from typing import Any

from dist_sae.checkpoint.run_folder import check_kind, run_file_key
from dist_sae.config import Run, dump_run, groups_of, with_absolute_paths
from dist_sae.distributed.mesh import Mesh
from dist_sae.distributed.watch import Watch
from dist_sae.errors import JobsFailedError
from dist_sae.storage import open_store
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.training.completed import completed_result
from dist_sae.training.setup import open_training


def train(
    run: Run,
    mesh: Mesh,
    watch: Watch,
    stopping: threading.Event,
    telemetry: Telemetry,
    group: int = 0,
) -> dict[str, Any]:
    """Train from the run's newest checkpoint, from its parent's (`train.parent`), or from scratch.

    The jobs of a sweep train together, each from its own start.

    For what a step does, see `training_step` and `TrainingJob.step` (training/job.py).

    Args:
        run: The run.
        mesh: This rank and its process groups.
        watch: Notified of this rank's current step, to detect a hang.
        stopping: When set on any rank, all ranks save and stop.
        telemetry: Exports the metrics.
        group: Number of this group of ranks, which trains its own jobs of a sweep (`groups_of`).

    Returns:
        The `step` and `rows` reached, `rows_with_parents` if the run has ancestors, and the last
        metrics reported. For a sweep, a dictionary of these results by run name.

    Raises:
        ConfigError: The kernels, the parent or the DeepSpeed configuration cannot be used.
        Stopped: `stopping` was set. All progress is saved in a checkpoint.
        DataExhaustedError: The activation set has too few rows.
        NonFiniteError: The loss or the gradient is not finite. The weights are unchanged.
        JobsFailedError: The loss or the gradient is not finite in some jobs of a sweep.
    """
    runs = groups_of(run)[group]
    store = open_store(run.store.runs, run.store.s3, telemetry, stopping)
    for each in runs if run.sweep is None else (run, *runs):
        check_kind(store, each)
    done = mesh.on_first_rank(lambda: _completed(runs)) if run.sweep else {}
    left = [each for each in runs if each.name not in done]
    if run.sweep and mesh.is_first:  # commands accept this folder in place of the run file
        store.put(run_file_key(run.name), dump_run(with_absolute_paths(run)).encode())
    if not left:
        return done
    is_sweep = run.sweep is not None
    opening = open_training(left, mesh, watch, stopping, telemetry, is_sweep=is_sweep)
    with opening as (batches, jobs):
        for batch in batches:
            for job in jobs:
                job.step(batch)
        for job in jobs:
            job.finish()
        batches.raise_if_stopped()
        if failures := [f"{job.run.name}: {job.failure}" for job in jobs if job.failure]:
            raise JobsFailedError("\n".join(failures))
    results = {job.run.name: job.result() for job in jobs}
    return done | results if run.sweep else results[run.name]


def _completed(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Return the results of complete jobs. Only rank 0 checks, so all ranks train the same jobs."""
    return {run.name: result for run in runs if (result := completed_result(run))}
