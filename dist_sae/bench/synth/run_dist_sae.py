"""Our part of `bench synth`: trains one rank's shard of a dictionary, and exports it for sae-lens.

Training is the same as in `dist-sae train`: initial weights, steps, schedules, dead latents and
checkpoint. Only the rows come from the world's files instead of an activation set.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_sae import __version__
from dist_sae.bench.synth.rows import TRAINING
from dist_sae.bench.synth.rows import Rows as WorldRows
from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.checkpoint.saver import Saver
from dist_sae.checkpoint.state import TrainingState
from dist_sae.config import Run
from dist_sae.config.fingerprint import run_fingerprint
from dist_sae.config.load import resolve_run
from dist_sae.dictionaries import PRODUCT_DTYPES, build_sae
from dist_sae.dictionaries.dead import DeadLatents
from dist_sae.dictionaries.ema import WeightAverage
from dist_sae.dictionaries.init import initialise_from_data
from dist_sae.dictionaries.interface import Rows
from dist_sae.dictionaries.normaliser import Normaliser, SiteNormalisers
from dist_sae.dictionaries.schedules import learning_rate
from dist_sae.distributed.engine import DeepSpeedEngine
from dist_sae.distributed.mesh import Mesh, join_mesh
from dist_sae.distributed.rendezvous import rendezvous
from dist_sae.interop.export import export
from dist_sae.kernels.choice import choose_kernels
from dist_sae.storage import open_store
from dist_sae.training.job import training_step

_SITE = "synthetic"
_NORMALISER_ROWS = 65_536


def build_run(spec: dict[str, Any]) -> Run:
    """Build the run that a spec describes.

    Raises:
        ConfigError: The settings are invalid.
    """
    url = str(Path(spec["work"]).absolute())
    return resolve_run(
        {
            "name": "synth",
            "store": {"activations": url, "runs": url},
            "model": {"kind": "synthetic"},
            "corpus": {"kind": "synthetic"},
            "activations": {"sites": [_SITE], "streams": spec["shards"]},
            "sae": {"kind": spec["kind"], "n_latents": spec["n_latents"]} | spec["settings"],
            "train": {
                "rows": spec["steps"] * spec["batch"],
                "batch_rows": spec["batch"],
                "lr": spec["lr"],
                "products": spec["products"],
                "seed": spec["seed"],
            }
            | spec["train"],
            "processes": {"trainers": spec["shards"], "latent_shards": spec["shards"]},
        },
        [],
        "bench synth",
    )


def normalisers_of(rows: WorldRows) -> SiteNormalisers:
    """Measure the scale and the mean on the first rows."""
    x = rows.batch(np.arange(min(len(rows), _NORMALISER_ROWS))).double()
    mean, mean_square = x.mean(0), float(x.square().sum(1).mean())
    scale = (rows.d_in / mean_square) ** 0.5
    variance = (mean_square - float(mean.square().sum())) * scale**2
    return SiteNormalisers(
        (_SITE,), (_SITE,), {_SITE: Normaliser(scale, mean * scale, variance, len(x))}
    )


def train(run: Run, mesh: Mesh, world: WorldRows, order_seed: int) -> tuple[TrainingState, float]:
    """Train this rank's shard. Returns its state, and the seconds of the steps."""
    normalisers, config = normalisers_of(world), run.train

    def batches(steps: int) -> Iterator[Rows]:
        for x in world.batches(config.batch_rows, steps, order_seed):
            yield normalisers.rows({_SITE: x.chunk(mesh.world)[mesh.rank]}, mesh.device)

    sae = build_sae(
        run.sae,
        normalisers.widths,
        mesh.axis,
        choose_kernels(config.kernels, mesh.device),
        PRODUCT_DTYPES[config.products],
    ).to(mesh.device)
    sae.initialise(next(batches(1)), config.seed)
    if run.sae.init_rows:
        initialise_from_data(sae, batches(-(-run.sae.init_rows // config.batch_rows)))
    engine = DeepSpeedEngine(run, sae, mesh)
    dead = DeadLatents(
        len(sae.W_enc), run.dead_after_rows, mesh.axis, mesh.device, layers=sae.layers
    )
    average = WeightAverage(sae, config.ema_decay) if config.ema_decay else None
    since = time.perf_counter()
    for step, rows in enumerate(batches(run.steps)):
        training_step(
            rows,
            engine,
            dead,
            average,
            batch_rows=config.batch_rows,
            variance=normalisers.variance,
            progress=step / run.steps,
            lr=learning_rate(
                step,
                run.steps,
                peak=run.lr,
                warmup_steps=config.warmup_steps,
                decay_share=config.decay_share,
            ),
            end_phase=lambda _: None,
        )
    return TrainingState(sae, engine, dead, average), time.perf_counter() - since


def save(run: Run, mesh: Mesh, world: WorldRows, state: TrainingState) -> str:
    """Save a checkpoint and export it for sae-lens. Returns the folder. Collective."""
    saver = Saver(
        checkpoints=Checkpoints(open_store(run.store.runs, run.store.s3), run.name, keep=1),
        state=state,
        scalars=normalisers_of(world).to_scalars() | {"plan": _SITE, "run": run_fingerprint(run)},
        all_gather=mesh.in_background().all_gather_objects,
        writes_manifest=mesh.is_first,
        before_commit=lambda: None,
        on_durable=lambda _: None,
        last_step=0,
    )
    saver.save(run.steps, {})
    saver.finish()
    return mesh.on_first_rank(lambda: export(run))


def main(path: str) -> int:
    """Train by the spec in the file. The first rank prints a JSON line."""
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    run, world = build_run(spec), WorldRows(Path(spec["folder"]), TRAINING)
    with rendezvous(spec["shards"]) as ranks, join_mesh(ranks, spec["shards"]) as mesh:
        state, seconds = train(run, mesh, world, spec["seed"])
        folder = save(run, mesh, world, state)
    if ranks.rank == 0:
        result = {"seconds": seconds, "out": folder, "version": __version__}
        sys.stdout.write("\n" + json.dumps(result) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
