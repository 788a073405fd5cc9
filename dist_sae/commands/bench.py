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
    text = "compare parts of dist-sae with the limits of this machine"
    actions = shared.add_group(commands, "bench", text, "WHAT")
    step = actions.add_parser("step", help="time a training step against the bare encoder product")
    step.add_argument(
        "--kernels",
        choices=["auto", "torch", "native", "triton"],
        default="auto",
        help="implementation of the sparse products (train.kernels)",
    )
    step.add_argument("--kind", default="topk", help="kind of dictionary (sae.kind)")
    step.add_argument(
        "--experts", type=int, default=16, help="number of experts of a routed dictionary"
    )
    step.add_argument("--reads", type=int, default=1, help="number of sites to read")
    step.add_argument(
        "--writes",
        type=int,
        default=0,
        help="number of other sites to write; 0: write the read sites",
    )
    step.add_argument(
        "--sae",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="settings",
        help="set another key of sae; may be given several times",
    )
    step.add_argument("--shards", type=int, default=1, help="torchrun ranks per dictionary")
    step.set_defaults(command=_main, bench=_step)
    routed = actions.add_parser(
        "routed", help="time a routed training step against an exact one of the same width"
    )
    routed.add_argument("--experts", type=int, default=16, help="number of experts")
    routed.set_defaults(command=_main, bench=_routed)
    metrics = actions.add_parser(
        "metrics", help="measure the cost of metrics per step and per scrape"
    )
    metrics.set_defaults(command=_main, bench=_metrics)
    peers = actions.add_parser("peers", help="time other SAE libraries from PyPI on the same rows")
    peers.add_argument("--steps", type=int, default=4, help="timed steps per round")
    peers.add_argument("--rows", type=Path, help=".npy file of activations; default: synthetic")
    peers.add_argument(
        "--transcoder",
        action="store_true",
        help="compare transcoders in the libraries that have them; rows are inputs, then targets",
    )
    peers.add_argument(
        "--folder", type=Path, help="folder in which the libraries' environments are kept"
    )
    peers.add_argument(
        "--fvu-rows",
        type=int,
        default=0,
        help="rows to train on before FVU is compared; 0: no comparison",
    )
    peers.add_argument(
        "--settings",
        nargs="+",
        choices=["as_shipped", "matched", "as_shipped_bf16", "matched_bf16"],
        help="settings to compare; default: all",
    )
    peers.set_defaults(command=_main, bench=_peers)
    checkpoint = actions.add_parser(
        "checkpoint", help="measure the cost of saving during training, and of loading"
    )
    checkpoint.add_argument("--every", type=int, default=200, help="steps between two saves")
    checkpoint.set_defaults(command=_main, bench=_checkpoint)
    store = actions.add_parser(
        "store", help="time writing and reading activations against raw PUT, GET"
    )
    store.add_argument("--units", type=int, default=16, help="number of units")
    store.add_argument("--unit-rows", type=int, default=16_384, help="rows per unit")
    store.add_argument("--block-rows", type=int, default=4096, help="rows per block")
    store.add_argument(
        "--dtype",
        choices=["bf16", "fp16", "fp32", "int8"],
        default="bf16",
        help="data type in storage",
    )
    store.add_argument("--streams", type=int, default=4, help="number of streams")
    store.add_argument(
        "--window-units",
        type=int,
        default=4,
        help="units of a stream whose rows are shuffled together",
    )
    store.add_argument(
        "--cached", action="store_true", help="let a folder's files stay in the page cache"
    )
    store.set_defaults(command=_main, bench=_store)
    for action in (store, checkpoint):
        action.add_argument(
            "--url",
            required=True,
            help="s3://bucket/prefix or a folder; the benchmark deletes what it writes",
        )
        action.add_argument("--endpoint-url", help="S3 endpoint, if the store is not AWS")
    for action in (step, routed, metrics):
        action.add_argument(
            "--products",
            choices=["bf16", "fp32"],
            default="bf16",
            help="precision of the encoder product",
        )
    for action in (step, routed, metrics, peers, checkpoint):
        action.add_argument("--n-latents", type=int, default=65_536, help="number of latents")
        action.add_argument("--k", type=int, default=32, help="active latents per row")
    synth = _add_synth(actions)
    of_runs = _add_of_runs(actions)
    rounds_of = {step: 9, routed: 9, metrics: 9, peers: 9, store: 5, checkpoint: 3}
    for action, rounds in rounds_of.items():
        action.add_argument("--d-in", type=int, default=768, help="width of the activations")
        action.add_argument("--batch", type=int, default=4096, help="rows per batch")
        action.add_argument("--rounds", type=int, default=rounds, help="timed rounds, for medians")
        action.add_argument("--json", action="store_true", help="print one JSON object")
    for action in (*rounds_of, *of_runs, synth):
        action.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")


def _add_of_runs(actions: shared.Commands) -> list[argparse.ArgumentParser]:
    """Add the benchmarks that use a run's model, text or dictionary."""
    produce = actions.add_parser("produce", help="time a producer against the bare forward pass")
    produce.add_argument("run", metavar="RUN.yaml", help="run file whose model and text are used")
    shared.add_settings(produce)
    produce.add_argument("--units", type=int, default=6, help="units to produce in each round")
    produce.add_argument("--rounds", type=int, default=5, help="timed rounds, for medians")
    produce.set_defaults(command=_main, bench=_produce)
    index = actions.add_parser(
        "index", help="time both stages of building a trained run's latent index"
    )
    index.add_argument("run", metavar="RUN", help="run with a checkpoint and stored units")
    shared.add_settings(index)
    index.add_argument("--units", type=int, default=33, help="units to index; one is not timed")
    index.set_defaults(command=_main, bench=_index)
    return [produce, index]


def _add_synth(actions: shared.Commands) -> argparse.ArgumentParser:
    """Add the benchmark on synthetic data with known features."""
    synth: argparse.ArgumentParser = actions.add_parser(
        "synth", help="run SynthSAEBench: our trainer and sae-lens's on rows with known features"
    )
    synth.add_argument(
        "--world",
        default="small",
        metavar="NAME|FOLDER",
        help="world to use: small, 16k (as published), or a folder with a synthetic model that "
        "sae-lens saved",
    )
    of_whom = {
        "ours": "dictionary for our trainer, as KIND KEY=VALUE ...: its sae.kind and settings of "
        "sae, or of train as train.KEY=VALUE; may be given several times; default: the world's",
        "theirs": "dictionary for sae-lens, as ARCHITECTURE KEY=VALUE ...; settings of "
        "SAETrainerConfig as train.KEY=VALUE; may be given several times",
    }
    for name, text in of_whom.items():
        synth.add_argument(f"--{name}", nargs="+", action="append", metavar="WORD", help=text)
    synth.add_argument("--rows", type=int, help="number of rows to train on; default: the world's")
    synth.add_argument("--n-latents", type=int, help="number of latents; default: the world's")
    synth.add_argument("--batch", type=int, default=1024, help="rows per batch")
    synth.add_argument("--lr", type=float, default=2e-3, help="learning rate of all trainers")
    synth.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        help="seeds of the initial weights and of the order of rows; default: 0",
    )
    synth.add_argument(
        "--shards",
        type=int,
        nargs="+",
        default=[1, 2],
        help="numbers of latent shards of our dictionaries; default: 1 2",
    )
    synth.add_argument(
        "--products",
        choices=["bf16", "fp32"],
        default="bf16",
        help="precision of our encoder product",
    )
    synth.add_argument(
        "--l0",
        type=float,
        help="active latents per row at which F1 is also measured, with one threshold for all "
        "latents; default: the world's",
    )
    synth.add_argument(
        "--folder", type=Path, help="folder in which sae-lens and the worlds are kept"
    )
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
