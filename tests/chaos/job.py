"""Producers and trainer ranks as processes that can be killed at any moment.

They run the real code with short waits.
"""

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dist_sae.training.batches
import dist_sae.training.loop
from dist_sae.config import Run
from dist_sae.data.loader import Batch, Loader
from dist_sae.data.work_queue import Worker
from dist_sae.distributed.mesh import join_mesh
from dist_sae.distributed.rendezvous import rendezvous
from dist_sae.distributed.watch import Watch
from dist_sae.errors import DistSaeError
from dist_sae.producing.loop import produce
from dist_sae.signals import stop_event
from dist_sae.storage.s3 import S3Store
from tests.chaos.scraper import serve
from tests.data.dataplane import quicken
from tests.world import only

MISSING_SECONDS, LOST_SECONDS = 10.0, 5.0


def produce_units(
    settings: dict[str, Any], target: Path, name: str, number: int, env: dict[str, str]
) -> None:
    """Run a producer until all units are done."""
    quicken(env)
    run = Run.model_validate(settings)
    worker = Worker(name, number, run.processes.producers)
    with serve("produce", target) as telemetry:
        produce(run, worker, threading.Event(), telemetry)


def train_rank(settings: dict[str, Any], target: Path, seen: Path, env: dict[str, str]) -> None:
    """Run one rank. Appends what it reads to `seen`: step, stream, digest of the rows."""
    quicken(env)
    logging.disable(logging.NOTSET)
    logging.basicConfig(filename=seen.with_suffix(f".{env['RANK']}.log"), level=logging.INFO)
    stopping = stop_event()
    run = Run.model_validate(settings)

    class Recording(Loader):
        def next(self, on_wait: Callable[[float], None] = lambda _: None) -> Batch | None:
            batch = super().next(on_wait)
            if batch is not None:
                with seen.open("a") as file:
                    parts = only(batch.acts).chunk(len(batch.cursors))
                    for stream, rows in zip(batch.cursors, parts, strict=True):
                        digest = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
                        file.write(json.dumps([batch.step, stream, digest]) + "\n")
            return batch

    setattr(dist_sae.training.batches, "Loader", Recording)  # noqa: B010 - not exported
    try:
        with (
            serve("train", target) as telemetry,
            rendezvous(run.processes.trainers, MISSING_SECONDS, stopping) as ranks,
            Watch(ranks, stopping, lost_seconds=LOST_SECONDS, hung_seconds=60.0) as watch,
            join_mesh(ranks, run.processes.latent_shards) as mesh,
        ):
            dist_sae.training.loop.train(run, mesh, watch, stopping, telemetry)
    except DistSaeError as error:
        logging.getLogger(__name__).info("ends: %s", error)
        os._exit(error.exit_code)


def train_with_stalled_save(
    settings: dict[str, Any], target: Path, seen: Path, env: dict[str, str]
) -> None:
    """Run one rank whose first checkpoint waits, half written, for a file `go` next to `seen`."""
    put = S3Store.put

    def held(self: S3Store, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        if "step-00000005/W_enc" in key:
            seen.with_name(f"held-{env['RANK']}").touch()
            while not seen.with_name("go").exists():
                time.sleep(0.02)
        return put(self, key, data, if_absent=if_absent)

    setattr(S3Store, "put", held)  # noqa: B010 - mypy wants no method replaced
    train_rank(settings, target, seen, env)
