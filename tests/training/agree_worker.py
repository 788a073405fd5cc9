"""One rank of a run in which only rank 1 has a reason to stop, or is slow.

Each rank counts its collectives at each step.
"""

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from dist_sae.config import load_run
from dist_sae.data.loader import Batch, Loader
from dist_sae.distributed.mesh import Mesh, join_mesh
from dist_sae.distributed.rendezvous import rendezvous
from dist_sae.distributed.watch import Watch
from dist_sae.errors import Stopped
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.training.loop import train

REASON_AT = 7
"""The step before which rank 1 has its reason to stop."""
SLOW_SECONDS = 0.05
"""Delay per step of the slow rank."""


def rank(path: Path, why: str, env: dict[str, str]) -> None:
    """Run the process. Writes the final message, collectives by step, and metrics page as JSON."""
    os.environ.update(env)
    torch.set_num_threads(1)
    run, stopping = load_run(path), threading.Event()
    own = int(env["RANK"]) == 1

    class Disturbed(Loader):
        """Loader that is always ready, until rank 1 has its reason to stop."""

        given = 0

        @property
        def is_ready(self) -> bool:
            if own and why == "slow":
                time.sleep(SLOW_SECONDS)
            while not self.loaded:
                time.sleep(0.005)
            return super().is_ready and not self._has_reason("data ends")

        def next(self, on_wait: Callable[[float], None] = lambda _: None) -> Batch | None:
            if self._has_reason("data ends"):
                return None
            batch = super().next(on_wait)
            if batch:
                self.given = batch.step + 1  # the first is read twice, once for initial values
            if self._has_reason("stop"):
                stopping.set()
            return batch

        def _has_reason(self, reason: str) -> bool:
            return own and why == reason and self.given >= REASON_AT

    exchanges: Counter[int] = Counter()
    step = 0

    class Noting(Watch):
        def set_step(self, at: int, *, working: bool) -> None:
            nonlocal step
            step = at
            super().set_step(at, working=working)

    def counted(name: str, mesh: Mesh) -> Any:
        whole = getattr(dist, name)

        def exchange(*args: Any, **options: Any) -> Any:
            if mesh.control in (*args, *options.values()):
                exchanges[step] += 1
            return whole(*args, **options)

        return mock.patch.object(dist, name, exchange)

    words = "ended"
    with (
        rendezvous(2) as ranks,
        # a separate event, because the watch itself would propagate `stopping` to other ranks
        Noting(ranks, threading.Event(), lost_seconds=60, hung_seconds=600) as watch,
        join_mesh(ranks) as mesh,
        mock.patch("dist_sae.training.batches.Loader", Disturbed),
        counted("all_reduce", mesh),
        counted("all_gather", mesh),
        counted("broadcast", mesh),
        Telemetry(run.name, "train", None) as telemetry,
    ):
        try:
            train(run, mesh, watch, stopping, telemetry)
        except Stopped as stop:
            words = str(stop)
        page = telemetry.render().decode()
    path.with_name(f"said-{ranks.rank}.json").write_text(json.dumps([words, exchanges, page]))
