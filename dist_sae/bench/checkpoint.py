"""`dist-sae bench checkpoint`: the cost of saving during training, and of loading.

One rank trains and saves to the store with the trainer's `Saver`. A save costs the time that
training stalls, plus the slowdown of the steps during the save. Then a separate process loads one
shard of a dictionary with 1, 2 and 4 shards.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch

from dist_sae.bench.measuring import peak_memory, scratch
from dist_sae.bench.step import StepShape, TrainingStep, bench_run, random_batches, seconds
from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.checkpoint.saver import Saved, Saver
from dist_sae.checkpoint.state import TrainingState
from dist_sae.config.data import S3Config, StoreConfig
from dist_sae.dictionaries import build_sae
from dist_sae.dictionaries.axis import LatentAxis
from dist_sae.dictionaries.dead import DeadLatents
from dist_sae.distributed.engine import Engine
from dist_sae.distributed.mesh import Mesh
from dist_sae.storage import ObjectStore, open_store
from dist_sae.telemetry.process import resident_bytes

_SHARDS = (1, 2, 4)
_RUN = "bench"


def bench_checkpoint(
    shape: StepShape, mesh: Mesh, store_config: StoreConfig, *, every: int, rounds: int
) -> dict[str, Any]:
    """Time background saves and loads in the store of runs, then delete what was written.

    Args:
        mesh: A mesh of one rank.
        every: Steps between two saves in a real run. Used only to compute `share`.
        rounds: Number of saves.

    Returns:
        Medians over `rounds`: `step_seconds` without a save; `stall_seconds`, in which training
        stopped; `slowed_seconds`, by which the steps during a save were slower in total;
        `durable_seconds` until the manifest was written; `share`, the cost of a save relative to
        the time of `every` steps, with the extremes `share_low` and `share_high`.
        `load_1_of_4_seconds` and `load_1_of_4_peak_bytes` are for a rank with a quarter of the
        latents. The bytes exclude the parameters themselves.

    Raises:
        ConfigError: The dictionary cannot be divided into 1, 2 and 4 shards.
    """
    for shards in _SHARDS:
        bench_run(shape, shards, shards)
    with scratch(store_config.runs, store_config.s3) as store:
        saves, step_seconds, size = _time_saves(shape, mesh, store, rounds)
        load = {
            n: _run_in_process(_time_load, shape, store.url, store_config.s3, n) for n in _SHARDS
        }
    shares = sorted((stall + slowed) / (every * step_seconds) for stall, slowed, _ in saves)
    stalls, slowed, durable = zip(*saves, strict=True)
    return {
        **shape._asdict(),
        "every": every,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "checkpoint_bytes": size,
        "step_seconds": step_seconds,
        "stall_seconds": statistics.median(stalls),
        "slowed_seconds": statistics.median(slowed),
        "durable_seconds": statistics.median(durable),
        "share": statistics.median(shares),
        "share_low": shares[0],
        "share_high": shares[-1],
        **{f"load_1_of_{n}_seconds": elapsed for n, (elapsed, _) in load.items()},
        **{f"load_1_of_{n}_peak_bytes": peak for n, (_, peak) in load.items()},
    }


def _time_saves(
    shape: StepShape, mesh: Mesh, store: ObjectStore, rounds: int
) -> tuple[list[tuple[float, float, float]], float, int]:
    """Time saves. Returns (stall, slowdown, durable) seconds of each, step seconds and bytes."""
    (rows,) = random_batches(shape, mesh, 1)
    step = TrainingStep(shape, mesh)
    step.initialise(rows)
    step(rows)  # warm-up: allocates Adam's moments and maps memory
    saves, undisturbed, durable = [], [], list[Saved]()
    with Saver(
        checkpoints=Checkpoints(store, _RUN, keep=1),
        state=step.state,
        scalars={},
        all_gather=lambda value, _: [value],
        writes_manifest=True,
        before_commit=lambda: None,
        on_durable=durable.append,
        last_step=0,
    ) as saver:
        for number in range(rounds):
            undisturbed += [seconds(partial(step, rows), mesh) for _ in range(3)]
            stall = seconds(partial(saver.save, number + 1, {}), mesh)
            during = []
            while saver.saving:
                during.append(seconds(partial(step, rows), mesh))
            saver.finish()
            usual = statistics.median(undisturbed)
            slowed = sum(one - usual for one in during)
            saves.append((stall, slowed, durable[-1].seconds))
    return saves, statistics.median(undisturbed), durable[-1].bytes


def _time_load(shape: StepShape, url: str, s3: S3Config, shards: int) -> tuple[float, float]:
    """Load the last shard. Returns the seconds and the peak increase of memory in bytes."""
    axis = LatentAxis(shard=shards - 1, shards=shards)
    run = bench_run(shape, shards, shards)
    sae = build_sae(run.sae, shape.widths, axis)
    dead = DeadLatents(len(sae.W_enc), run.dead_after_rows, axis)
    state = TrainingState(sae, Engine(run, sae), dead, None)
    checkpoint = Checkpoints(open_store(url, s3), _RUN, keep=1).latest()
    assert checkpoint is not None
    before = resident_bytes()
    with peak_memory() as peak:
        since = time.perf_counter()
        apply = state.read(checkpoint)
        apply()
        elapsed = time.perf_counter() - since
    return elapsed, float(peak[0] - before)


def _run_in_process(work: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()
