"""Production with a language model that is sharded over several ranks."""

import threading

from dist_sae.config import Run
from dist_sae.data.plan import load_plan, pin_to_plan
from dist_sae.data.work_queue import Worker
from dist_sae.distributed.leader import Leader, Work, follow, leading
from dist_sae.distributed.mesh import join_mesh
from dist_sae.distributed.rendezvous import rendezvous
from dist_sae.distributed.watch import Watch
from dist_sae.models import build_source
from dist_sae.models.forward import without_retries
from dist_sae.producing.loop import produce
from dist_sae.storage import open_store
from dist_sae.telemetry.exporter import Telemetry


def produce_together(
    run: Run, worker: Worker, stopping: threading.Event, telemetry: Telemetry
) -> dict[str, int]:
    """Produce as one of the `model.tensor_parallel` ranks that share a model; the first leads.

    Raises:
        RankLostError: Another rank is gone, hangs or has failed.
        PlanMismatchError: The store has no plan, or a plan that does not fit the run.
    """
    run = pin_to_plan(run, load_plan(open_store(run.store.activations, run.store.s3), run))
    timeouts = run.timeouts
    with (
        rendezvous(
            run.tensor_parallel,
            timeouts.missing_seconds,
            stopping,
            setting="model.tensor_parallel",
            name=run.name,
        ) as ranks,
        Watch(
            ranks, stopping, lost_seconds=timeouts.lost_seconds, hung_seconds=timeouts.hung_seconds
        ) as watch,
        join_mesh(ranks) as mesh,
    ):
        telemetry.device = mesh.device

        def open_work() -> Work:
            return without_retries(build_source(run.model, run.activations.sites).run)

        if not mesh.is_first:
            telemetry.liveness.idle()  # ready; from here on, the watch detects whether it hangs
            follow(open_work, mesh, watch)
            return {}
        with leading(mesh):
            return produce(run, worker, stopping, telemetry, lambda: Leader(open_work, mesh, watch))
