"""`dist-sae train`: the training loop of one rank."""

import threading

from dist_sae.config import Run
from dist_sae.distributed.mesh import Mesh
from dist_sae.distributed.watch import Watch
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.training.setup import open_training


def train(
    run: Run, mesh: Mesh, watch: Watch, stopping: threading.Event, telemetry: Telemetry
) -> dict[str, float]:
    """Train from the run's newest checkpoint, from its parent's (`train.parent`), or from scratch.

    What a step does is in `training_step` and `TrainingJob.step` (training/job.py).

    Args:
        run: The run.
        mesh: This rank and its process groups.
        watch: Learns at which step this rank is, to tell whether it hangs.
        stopping: When set on any rank, all ranks save and stop.
        telemetry: Exports the metrics.

    Returns:
        `step` and `rows` reached, with parents also `rows_with_parents`, and the last numbers
        reported.

    Raises:
        ConfigError: The kernels, the parent or the DeepSpeed configuration cannot be used.
        Stopped: `stopping` was set; a checkpoint holds everything so far.
        DataExhaustedError: The activation set has too few rows.
        NonFiniteError: The loss or the gradient is not finite; the weights are as before.
    """
    with open_training([run], mesh, watch, stopping, telemetry) as (batches, jobs):
        for batch in batches:
            for job in jobs:
                job.step(batch)
        for job in jobs:
            job.finish()
        batches.raise_if_stopped()
        return jobs[0].result()
