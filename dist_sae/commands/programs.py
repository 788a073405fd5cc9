"""The programs of a run: `run` does everything on this machine, the others are its parts."""

import argparse
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING

from dist_sae import logs, signals
from dist_sae.commands import shared

if TYPE_CHECKING:
    from dist_sae.config import Run
    from dist_sae.telemetry.exporter import Telemetry


def add(commands: shared.Commands) -> None:
    """Add the commands."""
    add = partial(shared.add_command, commands)
    run = add(
        "run",
        _run,
        "do everything on this machine: plan, produce, train, evaluate, export, report",
    )
    add("plan", _plan, "read the corpus and fix which documents make up which unit")
    produce = add("produce", _produce, "run the model over units and store their activations")
    train = add("train", _train, "train, as the rank that RANK and WORLD_SIZE name")
    evaluate = add("evaluate", _evaluate, "measure a checkpoint on held-out data")
    export = add("export", _export, "write a checkpoint as safetensors that SAELens loads")
    report = add("report", _report, "write one HTML file with a run's curves, numbers and latents")
    text = "print the DeepSpeed configuration and the Kubernetes objects of a run"
    add("render", _render, text).add_argument(
        "--only",
        choices=("deepspeed", "kubernetes", "dashboards"),
        help="kubernetes: as kubectl apply -f - reads it; dashboards: Grafana's",
    )
    produce.add_argument("--worker", help="name of this producer; unique among running ones")
    produce.add_argument(
        "--index",
        type=int,
        default=int(os.environ.get("JOB_COMPLETION_INDEX", "0")),
        help="number of this producer, below processes.producers; needed where the store has no "
        "conditional writes (default: JOB_COMPLETION_INDEX, else 0)",
    )
    for parser in (run, train):
        parser.add_argument(
            "--from",
            dest="set",
            action="append",
            type=lambda name: f"train.parent.run={name}",
            metavar="NAME",
            help="continue another run of store.runs (same as --set train.parent.run=NAME)",
        )
    for parser in (produce, train):
        parser.add_argument("--port-offset", type=int, default=0, help="added to telemetry.port")
        parser.add_argument(
            "--local-ranks",
            type=int,
            default=0,
            metavar="N",
            help="start N ranks here, those of node JOB_COMPLETION_INDEX (pods use it)",
        )
    for parser in (evaluate, export, report):
        shared.add_step(parser)
    for parser in (produce, train, evaluate):
        awaited = "the last checkpoint" if parser is evaluate else "the plan"
        parser.add_argument("--wait", action="store_true", help=f"wait for {awaited}")


def _run(options: argparse.Namespace) -> None:
    run = shared.load(options)
    from dist_sae.commands.pipeline import run_locally

    result = run_locally(run, options.run, options.set, signals.stop_event())
    shared.print_result(options, result)


def _plan(options: argparse.Namespace) -> None:
    run = shared.load(options)
    from dist_sae.producing.planner import foresee

    with _short_lived(run, "plan") as telemetry:
        _, told = foresee(run, telemetry)
    shared.print_result(options, told)


def _produce(options: argparse.Namespace) -> int | None:
    """Produce as one process, or as the parent of a pod's ranks."""
    run = shared.load(options)
    from dist_sae.data.work_queue import Worker
    from dist_sae.distributed.local_ranks import rank_environments
    from dist_sae.producing.loop import produce
    from dist_sae.producing.together import produce_together
    from dist_sae.telemetry.exporter import Telemetry
    from dist_sae.training.waiting import await_plan

    stopping = signals.stop_event()
    first_rank = options.index * run.tensor_parallel
    if options.local_ranks > 1:
        name = ["--worker", options.worker] if options.worker else []
        arguments = ["produce", "--index", str(options.index), *name]
        environments = rank_environments(options.local_ranks, run.tensor_parallel)
        return _run_local_ranks(options, run, arguments, environments, stopping, first_rank)
    worker = Worker(
        options.worker or f"producer-{os.getpid()}@{os.uname().nodename}",
        options.index,
        run.processes.producers,
    )
    port = _metrics_port(run, options)
    with Telemetry(run.name, "produce", port, first_rank + shared.rank()) as telemetry:
        if options.wait:  # while metrics are served: a process that waits is alive
            await_plan(run, stopping)
        work = produce_together if run.tensor_parallel > 1 else produce
        result = work(run, worker, stopping, telemetry)
    shared.print_result(options, result)
    return None


def _train(options: argparse.Namespace) -> int | None:
    """Train as one rank, or as the parent of a pod's ranks."""
    run = shared.load(options)
    from dist_sae.distributed.local_ranks import rank_environments
    from dist_sae.distributed.mesh import join_mesh
    from dist_sae.distributed.rendezvous import rendezvous
    from dist_sae.distributed.watch import Watch
    from dist_sae.telemetry.exporter import Telemetry
    from dist_sae.training.completed import completed_result
    from dist_sae.training.loop import train
    from dist_sae.training.waiting import await_plan

    world = run.processes.trainers
    if world > 1 and (result := completed_result(run)):
        shared.print_result(options, result)
        return None
    stopping = signals.stop_event()
    if options.local_ranks:
        environments = rank_environments(options.local_ranks, world)
        if options.local_ranks > 1:
            return _run_local_ranks(options, run, ["train"], environments, stopping)
        os.environ.update(environments[0])
        logs.configure(rank=shared.rank())
    timeouts, port = run.timeouts, _metrics_port(run, options)
    with Telemetry(run.name, "train", port, shared.rank()) as telemetry:
        telemetry.set("dist_sae_train_ranks", world)  # before the rendezvous: one may not come
        if options.wait:  # while metrics are served: a process that waits is alive
            await_plan(run, stopping)
        with (
            rendezvous(world, timeouts.missing_seconds, stopping, name=run.name) as ranks,
            Watch(
                ranks,
                stopping,
                lost_seconds=timeouts.lost_seconds,
                hung_seconds=timeouts.hung_seconds,
            ) as watch,
            _lease(run, stopping),
            join_mesh(ranks, run.processes.latent_shards) as mesh,
        ):
            result = train(run, mesh, watch, stopping, telemetry)
    shared.print_result(options, result)
    return None


def _evaluate(options: argparse.Namespace) -> None:
    run = shared.load(options)
    from dist_sae.evaluation.evaluate import evaluate

    if options.wait:
        from dist_sae.training.waiting import await_end

        await_end(run, signals.stop_event())
        signals.heed()
    with _short_lived(run, "evaluate") as telemetry:
        result = evaluate(run, telemetry, options.step)
    shared.print_result(options, result)


def _export(options: argparse.Namespace) -> None:
    run = shared.load(options)
    from dist_sae.interop.export import export

    with _short_lived(run, "export") as telemetry:
        result = export(run, telemetry, options.step)
    shared.print_result(options, {"export": result})


def _report(options: argparse.Namespace) -> None:
    run = shared.load(options)
    from dist_sae.report.build import report

    with _short_lived(run, "report") as telemetry:
        result = report(run, telemetry, options.step)
    shared.print_result(options, {"report": result})


def _render(options: argparse.Namespace) -> None:
    run = shared.load(options)
    from dist_sae.kubernetes.render import render, to_yaml

    found = render(run, options.only)
    if options.only == "kubernetes" and not options.json:
        sys.stdout.write(to_yaml(found["kubernetes"]))
    else:
        shared.print_json(options, found)


def _short_lived(run: "Run", role: str) -> "Telemetry":
    """Metrics of a program that ends before anybody can scrape it: they are pushed."""
    from dist_sae.telemetry.exporter import Telemetry

    return Telemetry(run.name, role, None, pushgateway_url=run.telemetry.pushgateway_url)


def _metrics_port(run: "Run", options: argparse.Namespace) -> int | None:
    """The port of this process; 0 stays any free port."""
    first: int | None = run.telemetry.port
    return first + options.port_offset if first else first


def _lease(run: "Run", stopping: threading.Event) -> AbstractContextManager[object]:
    """The lease on the run, which rank 0 holds: no other job may train it meanwhile."""
    from dist_sae.checkpoint.lease import TrainerLease
    from dist_sae.storage import open_store

    if shared.rank():
        return nullcontext()
    runs = open_store(run.store.runs, run.store.s3, None, stopping)
    return TrainerLease(runs, run.name, stopping)


def _run_local_ranks(
    options: argparse.Namespace,
    run: "Run",
    arguments: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    stopping: threading.Event,
    first_rank: int = 0,
) -> int:
    """Run this pod's ranks as children, and serve the metrics of all on one page.

    Args:
        options: As given to this process; the ranks get the same run, overrides and `--wait`.
        run: The run.
        arguments: The program and its own options.
        environments: Environment variables of each rank.
        stopping: When set, all are told to save and stop.
        first_rank: Added to `RANK` in the labels of the metrics.
    """
    from dist_sae.distributed.local_ranks import run_ranks
    from dist_sae.telemetry.gather import GatheredTelemetry

    program, *others = arguments
    overrides = [word for override in options.set for word in ("--set", override)]
    waiting = ["--wait"] if options.wait else []
    command = [program, options.run, *overrides, *waiting, *others]
    with ExitStack() as serving:
        if port := run.telemetry.port:
            ports = {
                first_rank + int(environment["RANK"]): port + 1 + i
                for i, environment in enumerate(environments)
            }
            serving.enter_context(GatheredTelemetry(run.name, program, ports, port))
        return run_ranks(command, environments, stopping)
