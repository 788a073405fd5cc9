"""Index workers as processes that can be killed at any moment."""

import logging
import threading
from typing import Any

import torch

import dist_sae.data.work_queue
from dist_sae.config import Run
from dist_sae.data.work_queue import Worker
from dist_sae.index import layout
from dist_sae.index.build import index
from dist_sae.telemetry.exporter import Telemetry


def work(settings: dict[str, Any], name: str, number: int, bucket_latents: int) -> None:
    """Run a worker until the index is done, with short waits and one thread."""
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    dist_sae.data.work_queue.POLL_SECONDS = 0.05
    dist_sae.data.work_queue.LEASE_SECONDS = 2.0
    layout.LEAST_LATENTS = bucket_latents
    run = Run.model_validate(settings)
    worker = Worker(name, number, run.index.workers)
    index(run, worker, threading.Event(), Telemetry(run.name, "index", None))
