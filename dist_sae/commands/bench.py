"""`dist-sae bench`: benchmarks that compare with the limits of this machine."""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_sae.commands import shared

if TYPE_CHECKING:
    from dist_sae.bench.step import StepShape

Result = Mapping[str, Any] | str | None
"""Numbers, a text to print, or None on ranks that print nothing."""


def add(commands: shared.Commands) -> None:
    """Add the command."""
    text = "measure against the limit of this machine, in one run"
    actions = shared.add_group(commands, "bench", text, "WHAT")
    step = actions.add_parser("step", help="a training step against the bare encoder product")
    step.add_argument("--kernels", choices=["auto", "torch", "native", "triton"], default="auto")
    step.add_argument("--kind", default="topk", help="of dictionary (sae.kind)")
    step.add_argument("--experts", type=int, default=16, help="experts of a routed dictionary")
    step.add_argument("--reads", type=int, default=1, help="sites that are read")
    step.add_argument(
        "--writes", type=int, default=0, help="other sites that are written; 0: those that are read"
    )
    step.add_argument(
        "--sae",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="settings",
        help="another setting of the recipe",
    )
    step.add_argument("--shards", type=int, default=1, help="ranks of torchrun per dictionary")
    step.set_defaults(command=_main, bench=_step)
    routed = actions.add_parser(
        "routed", help="a routed training step against an exact one of the same width"
    )
    routed.add_argument("--experts", type=int, default=16)
    routed.set_defaults(command=_main, bench=_routed)
    metrics = actions.add_parser("metrics", help="cost of metrics per step and per scrape")
    metrics.set_defaults(command=_main, bench=_metrics)
    peers = actions.add_parser("peers", help="the same rows through other SAE libraries from PyPI")
    peers.add_argument("--steps", type=int, default=4, help="timed steps of one round")
    peers.add_argument("--rows", type=Path, help=".npy with activations; synthetic if left out")
    peers.add_argument(
        "--transcoder",
        action="store_true",
        help="transcoders, by the libraries that train them; rows are inputs, then targets",
    )
    peers.add_argument("--folder", type=Path, help="folder that keeps the libraries' environments")
    peers.add_argument(
        "--fvu-rows", type=int, default=0, help="rows of the FVU comparison; 0: none"
    )
    peers.add_argument(
        "--settings",
        nargs="+",
        choices=["as_shipped", "matched", "as_shipped_bf16", "matched_bf16"],
        help="only these; default: all",
    )
    peers.set_defaults(command=_main, bench=_peers)
    checkpoint = actions.add_parser(
        "checkpoint", help="cost of saving during training, and of loading"
    )
    checkpoint.add_argument("--every", type=int, default=200, help="steps between two saves")
    checkpoint.set_defaults(command=_main, bench=_checkpoint)
    store = actions.add_parser("store", help="writing and reading activations against raw PUT, GET")
    store.add_argument("--units", type=int, default=16)
    store.add_argument("--unit-rows", type=int, default=16_384)
    store.add_argument("--block-rows", type=int, default=4096)
    store.add_argument("--dtype", choices=["bf16", "fp16", "fp32", "int8"], default="bf16")
    store.add_argument("--streams", type=int, default=4)
    store.add_argument("--window-units", type=int, default=4)
    store.add_argument(
        "--cached", action="store_true", help="let a folder's files stay in the page cache"
    )
    store.set_defaults(command=_main, bench=_store)
    for action in (store, checkpoint):
        action.add_argument(
            "--url",
            required=True,
            help="s3://bucket/prefix or a folder; the bench deletes what it writes",
        )
        action.add_argument("--endpoint-url", help="endpoint of a store other than AWS")
    for action in (step, routed, metrics):
        action.add_argument("--products", choices=["bf16", "fp32"], default="bf16")
    for action in (step, routed, metrics, peers, checkpoint):
        action.add_argument("--n-latents", type=int, default=65_536)
        action.add_argument("--k", type=int, default=32)
    synth = _add_synth(actions)
    of_runs = _add_of_runs(actions)
    rounds_of = {step: 9, routed: 9, metrics: 9, peers: 9, store: 5, checkpoint: 3}
    for action, rounds in rounds_of.items():
        action.add_argument("--d-in", type=int, default=768)
        action.add_argument("--batch", type=int, default=4096, help="rows")
        action.add_argument("--rounds", type=int, default=rounds, help="timed rounds, for medians")
        action.add_argument("--json", action="store_true", help="print one JSON object")
    for action in (*rounds_of, *of_runs, synth):
        action.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")


def _add_of_runs(actions: shared.Commands) -> list[argparse.ArgumentParser]:
    """Add the benchmarks that use a run's model, text or dictionary."""
    produce = actions.add_parser("produce", help="a producer against the bare forward pass")
    produce.add_argument("run", metavar="RUN.yaml", help="its model and text are used")
    shared.add_settings(produce)
    produce.add_argument("--units", type=int, default=6, help="units produced in each round")
    produce.add_argument("--rounds", type=int, default=5, help="timed rounds, for medians")
    produce.set_defaults(command=_main, bench=_produce)
    index = actions.add_parser("index", help="both stages of a latent index of a trained run")
    index.add_argument("run", metavar="RUN", help="a run with a checkpoint and kept units")
    shared.add_settings(index)
    index.add_argument("--units", type=int, default=33, help="units indexed; one is not timed")
    index.set_defaults(command=_main, bench=_index)
    return [produce, index]


def _add_synth(actions: shared.Commands) -> argparse.ArgumentParser:
    """Add the benchmark on synthetic data with known features."""
    synth: argparse.ArgumentParser = actions.add_parser(
        "synth", help="SynthSAEBench: our trainer and sae-lens's on rows with known features"
    )
    synth.add_argument(
        "--world",
        default="small",
        metavar="NAME|FOLDER",
        help="small, 16k (as published), or a folder with a synthetic model that sae-lens saved",
    )
    of_whom = {
        "ours": "KIND KEY=VALUE ...: a dictionary of ours, its sae.kind and settings of sae; those "
        "of train as train.KEY=VALUE. May be given several times; default: those of the world",
        "theirs": "ARCHITECTURE KEY=VALUE ...: the same for a dictionary of sae-lens; settings of "
        "SAETrainerConfig as train.KEY=VALUE",
    }
    for name, text in of_whom.items():
        synth.add_argument(f"--{name}", nargs="+", action="append", metavar="WORD", help=text)
    synth.add_argument("--rows", type=int, help="rows to train on; default: the world's")
    synth.add_argument("--n-latents", type=int, help="default: the world's")
    synth.add_argument("--batch", type=int, default=1024, help="rows")
    synth.add_argument("--lr", type=float, default=2e-3, help="learning rate of all trainers")
    synth.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        help="of initial weights and of the order of rows; default: 0",
    )
    synth.add_argument(
        "--shards",
        type=int,
        nargs="+",
        default=[1, 2],
        help="latent shards of our dictionaries; default: 1 2",
    )
    synth.add_argument("--products", choices=["bf16", "fp32"], default="bf16", help="of ours")
    synth.add_argument(
        "--l0",
        type=float,
        help="active latents per row at which F1 is given as well, by one threshold for all "
        "latents; default: the world's",
    )
    synth.add_argument("--folder", type=Path, help="folder that keeps sae-lens and the worlds")
    synth.add_argument("--json", action="store_true", help="print one JSON object")
    synth.set_defaults(command=_main, bench=_synth)
    return synth


def _main(options: argparse.Namespace) -> None:
    """Run the chosen benchmark and print its result."""
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    result = options.bench(options)
    if isinstance(result, str):
        sys.stdout.write(result)
    elif result is not None:
        shared.print_result(options, result)


def _step(options: argparse.Namespace) -> Result:
    from dist_sae.bench.step import bench_step, step_mesh

    shape = _step_shape(options)
    if options.kind != "routed":
        shape = shape._replace(experts=None)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    with step_mesh(shape, world, options.shards) as mesh:
        result = bench_step(shape, mesh, rounds=options.rounds)
    return result if mesh.is_first else None


def _routed(options: argparse.Namespace) -> Result:
    from dist_sae.bench.step import bench_routed, step_mesh

    shape = _step_shape(options)._replace(kind="routed")
    with step_mesh(shape) as mesh:
        return bench_routed(shape, mesh, rounds=options.rounds)


def _metrics(options: argparse.Namespace) -> Result:
    from dist_sae.bench.metrics import bench_metrics
    from dist_sae.bench.step import step_mesh

    shape = _step_shape(options)
    with step_mesh(shape) as mesh:
        return bench_metrics(shape, mesh, rounds=options.rounds)


def _checkpoint(options: argparse.Namespace) -> Result:
    from dist_sae.bench.checkpoint import bench_checkpoint
    from dist_sae.bench.step import bench_run, step_mesh

    shape = _step_shape(options)
    run = bench_run(shape, 1, 1, url=options.url, endpoint_url=options.endpoint_url)
    with step_mesh(shape) as mesh:
        return bench_checkpoint(shape, mesh, run.store, every=options.every, rounds=options.rounds)


def _step_shape(options: argparse.Namespace) -> "StepShape":
    """Return the step's shape from the options, with defaults for fields that are not options."""
    from dist_sae.bench.step import StepShape

    return StepShape(**{k: v for k, v in vars(options).items() if k in StepShape._fields})


def _produce(options: argparse.Namespace) -> Result:
    run = shared.load(options)
    from dist_sae.bench.produce import bench_produce

    return bench_produce(run, units=options.units, rounds=options.rounds)


def _index(options: argparse.Namespace) -> Result:
    run = shared.load(options)
    from dist_sae.bench.index import bench_index

    return bench_index(run, units=options.units)


def _peers(options: argparse.Namespace) -> Result:
    from dist_sae.bench.peers import bench_peers, render_table
    from dist_sae.bench.peers.environments import SETTINGS

    rows = bench_peers(
        d_in=options.d_in,
        n_latents=options.n_latents,
        k=options.k,
        batch=options.batch,
        steps=options.steps,
        rounds=options.rounds,
        threads=options.threads or os.cpu_count() or 1,
        rows=options.rows,
        folder=options.folder,
        fvu_rows=options.fvu_rows,
        transcoder=options.transcoder,
        settings=options.settings or SETTINGS,
    )
    return {"peers": rows} if options.json else render_table(rows)


def _synth(options: argparse.Namespace) -> Result:
    from dist_sae.bench.synth.worlds import DIST_SAE, SAE_LENS, find_world, parse_trainer

    world = find_world(options.world)
    given = [
        parse_trainer(library, words)
        for library, all_words in ((DIST_SAE, options.ours), (SAE_LENS, options.theirs))
        for words in all_words or ()
    ]
    from dist_sae.bench.synth import Comparison, bench_synth, render_table

    comparison = Comparison(
        world=world,
        trainers=given or world.trainers,
        rows=options.rows or world.rows,
        n_latents=options.n_latents or world.n_latents,
        batch=options.batch,
        lr=options.lr,
        seeds=options.seeds,
        shards=options.shards,
        products=options.products,
        threads=options.threads or os.cpu_count() or 1,
        l0=world.l0 if options.l0 is None else options.l0,
    )
    result = bench_synth(comparison, options.folder)
    return result if options.json else render_table(result)


def _store(options: argparse.Namespace) -> Result:
    from dist_sae.bench.store import StoreShape, bench_run, bench_store

    shape = StoreShape(**{k: v for k, v in vars(options).items() if k in StoreShape._fields})
    run = bench_run(shape, options.url, options.endpoint_url)
    return bench_store(run, shape, rounds=options.rounds, cached=options.cached)
