"""Producers and a trainer's reading side as processes that can be killed at any moment."""

import hashlib
import json
import logging
import os
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import dist_sae.data.activation_set
import dist_sae.data.work_queue
import dist_sae.retry
from dist_sae.config import Run
from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.consumers import Consumers, Registration
from dist_sae.data.loader import Loader
from dist_sae.data.plan import load_plan
from dist_sae.data.streams import StreamCursor
from dist_sae.data.work_queue import Worker
from dist_sae.producing import loop
from dist_sae.storage import open_store
from dist_sae.telemetry.exporter import Telemetry
from tests.world import RowNumbers, only

SAVE_EVERY = 4  # steps


def quicken(credentials: Mapping[str, str]) -> None:
    """Set up this process: credentials, short waits, one thread, no logging."""
    os.environ.update(credentials)
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    dist_sae.data.work_queue.POLL_SECONDS = 0.05
    dist_sae.data.work_queue.LEASE_SECONDS = 2.0
    dist_sae.data.activation_set.POLL_SECONDS = (0.02, 0.1)
    dist_sae.retry.FIRST_PAUSE_SECONDS = 0.02
    dist_sae.retry.LONGEST_PAUSE_SECONDS = 0.2


def produce(settings: dict[str, Any], name: str, number: int, credentials: dict[str, str]) -> None:
    """Run a producer until all units are done."""
    quicken(credentials)
    run = Run.model_validate(settings)
    setattr(loop, "build_source", lambda *_: RowNumbers())  # noqa: B010 - not exported
    worker = Worker(name, number, run.processes.producers)
    loop.produce(run, worker, threading.Event(), Telemetry("w", "produce", None))


def read(settings: dict[str, Any], world: int, folder: Path, credentials: dict[str, str]) -> None:
    """Run the reading side of a trainer of `world` ranks: resume, read, save, register.

    Writes a line for each step: its number, the digest of the batch, the rows in it. After a kill,
    the steps since the last save are read again, as in a trainer.
    """
    quicken(credentials)
    run = Run.model_validate(settings)
    store = open_store(run.store.activations, run.store.s3)
    plan = load_plan(store, run)
    saved = folder / "saved.json"
    step, cursors = 0, dict[int, StreamCursor]()
    if saved.exists():
        state = json.loads(saved.read_text())
        step = state["step"]
        cursors = {int(v): StreamCursor(*cursor) for v, cursor in state["cursors"].items()}
    registration = Registration(
        Consumers(store, run.store.consumer_expiry_hours),
        plan,
        run.name,
        multi_pass=False,
        retires=run.store.retention == "delete_consumed",
    )
    registration.register(cursors, ended=step == run.steps)
    activation_set = ActivationSet(store, plan, run.sites, threading.Event())
    loaders = [
        Loader(
            activation_set,
            rank=rank,
            world=world,
            batch_rows=run.train.batch_rows,
            steps=range(step, run.steps),
            max_passes=1,
            cursors=cursors,
        )
        for rank in range(world)
    ]
    with ExitStack() as stack:
        log = stack.enter_context((folder / "log.jsonl").open("a"))
        log.write("\n")  # a killed process may have left an incomplete line
        for loader in loaders:
            stack.enter_context(loader)
        while step < run.steps:
            batches = [loader.next() for loader in loaders]
            assert all(batch is not None for batch in batches)
            acts = torch.cat([only(batch.acts) for batch in batches if batch])
            cursors = {v: place for batch in batches if batch for v, place in batch.cursors.items()}
            registration.advance(cursors)
            step += 1
            digest = hashlib.sha256(acts.numpy().tobytes()).hexdigest()
            rows = [int(row) for row in acts[:, 0]]
            log.write(json.dumps({"step": step, "digest": digest, "rows": rows}) + "\n")
            log.flush()
            if step % SAVE_EVERY == 0 or step == run.steps:
                new = saved.with_suffix(".new")
                new.write_text(json.dumps({"step": step, "cursors": cursors}))
                new.replace(saved)
                registration.checkpointed(cursors, ended=step == run.steps)
