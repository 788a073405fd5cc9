"""Evaluation by several ranks, for a language model or a dictionary that does not fit on one."""

import threading
from typing import Any

from dist_sae.config import Run
from dist_sae.distributed.mesh import join_mesh
from dist_sae.distributed.rendezvous import rendezvous
from dist_sae.distributed.watch import Watch
from dist_sae.errors import ConfigError
from dist_sae.evaluation.evaluate import evaluate
from dist_sae.storage import UNMETERED, Meter


def evaluate_on_ranks(
    run: Run, world: int, meter: Meter = UNMETERED, step: int | None = None
) -> dict[str, Any]:
    """Evaluate as one of several ranks (RANK, WORLD_SIZE), each with a shard of the latents.

    All ranks process the same rows at the same time. With `model.tensor_parallel`, they also share
    the language model; otherwise each rank has the whole model.

    Args:
        run: The run.
        world: Number of ranks.
        meter: Receives the metrics.
        step: Step of the checkpoint; None takes the newest.

    Raises:
        ConfigError: The dictionary or the model cannot be divided over this number of ranks.
        RankLostError: Another rank is lost or has failed.
    """
    if not run.sae.can_shard_over(world):
        experts = f" in {run.sae.n_experts} experts" if run.sae.n_experts else ""
        raise ConfigError(
            f"WORLD_SIZE is {world}, which does not divide the {run.sae.n_latents} latents"
            f"{experts}; start a number of ranks that does, or one"
        )
    timeouts, stopping = run.timeouts, threading.Event()
    with (
        rendezvous(
            run.tensor_parallel if run.tensor_parallel > 1 else world,
            timeouts.missing_seconds,
            setting="model.tensor_parallel",
            name=f"{run.name}-evaluate",
        ) as ranks,
        Watch(
            ranks, stopping, lost_seconds=timeouts.lost_seconds, hung_seconds=timeouts.hung_seconds
        ),
        join_mesh(ranks, world) as mesh,
    ):
        return evaluate(run, meter if mesh.is_first else UNMETERED, step, mesh.same_rows())
