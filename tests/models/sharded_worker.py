"""One of the ranks that share tiny models."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dist_sae.bench.measuring import peak_memory
from dist_sae.config import Run
from dist_sae.config.data import HuggingFaceModel
from dist_sae.data.work_queue import Worker
from dist_sae.distributed.mesh import join_mesh
from dist_sae.distributed.rendezvous import rendezvous
from dist_sae.errors import DistSaeError
from dist_sae.models.huggingface import HuggingFaceSource
from dist_sae.models.sites import blocks
from dist_sae.producing.loop import produce
from dist_sae.producing.together import produce_together
from dist_sae.signals import stop_event
from dist_sae.telemetry.exporter import Telemetry
from tests.memory import anonymous_bytes


def rank(
    models: list[tuple[dict[str, Any], tuple[str, ...]]],
    batch: tuple[torch.Tensor, torch.Tensor],
    output: str,
    env: dict[str, str],
) -> None:
    """Write each model's activations, size of its blocks, and peak memory to `output`."""
    os.environ.update(env)
    torch.set_num_threads(1)
    results = []
    try:
        with rendezvous(int(env["WORLD_SIZE"])) as ranks, join_mesh(ranks):
            for settings, sites in models:
                before = anonymous_bytes()
                with peak_memory(anonymous_bytes) as peak:
                    source = HuggingFaceSource(HuggingFaceModel.model_validate(settings), sites)
                weights = sum(
                    (p.to_local() if isinstance(p, DTensor) else p).numel()
                    for p in blocks(source.model).parameters()
                )
                results.append((source.run(*batch), weights, peak[0] - before))
    except DistSaeError as error:
        sys.stderr.write(f"error: {error}\n")
        os._exit(error.exit_code)
    torch.save(results, output)


def produce_rank(settings: dict[str, Any], output: str, env: dict[str, str]) -> None:
    """Run one rank of a producer, or a whole producer. An error goes to `output`."""
    os.environ.update(env)
    torch.set_num_threads(1)
    stopping = stop_event()
    run = Run.model_validate(settings)
    work = produce_together if run.tensor_parallel > 1 else produce
    try:
        work(
            run, Worker(f"producer-{env['MASTER_PORT']}"), stopping, Telemetry("t", "produce", None)
        )
    except DistSaeError as error:
        Path(output).write_text(str(error))
        os._exit(error.exit_code)
