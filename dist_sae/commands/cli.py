"""The command line: the only place where the programs meet.

Programs are imported when they are called, so that `--help` answers at once, and after the run file
is read, so that a mistake in it is told before torch is imported, which takes seconds.
"""

import argparse
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

from dist_sae import __version__, logs, signals
from dist_sae.bench.commands import add_benches
from dist_sae.commands.cluster import add_cluster_commands
from dist_sae.commands.completion import SHELLS, render_completion
from dist_sae.commands.groups import add_groups
from dist_sae.distributed.supervisor import follow_parent
from dist_sae.errors import EXIT_DONE, EXIT_RESUMABLE, DistSaeError, Stopped

if TYPE_CHECKING:
    from dist_sae.config import Run
    from dist_sae.telemetry.exporter import Telemetry

Command = Callable[[argparse.Namespace], int | None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (see `dist_sae.errors`)."""
    options = command_parser().parse_args(arguments)
    # torch's large buffers in large pages: on a CPU most are allocated anew at every step
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    logs.configure(rank=_rank())
    signals.heed()
    follow_parent()
    try:
        code = options.command(options)
        sys.stdout.flush()
    except Stopped as stop:
        sys.stderr.write(f"stopped: {stop}\n")
        return stop.exit_code
    except DistSaeError as error:
        for line in str(error).splitlines():
            sys.stderr.write(f"error: {line}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write(signals.INTERRUPTED)
        return EXIT_RESUMABLE
    except BrokenPipeError:  # whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the exit fails too
        return EXIT_DONE
    return code or EXIT_DONE


def _plan(options: argparse.Namespace) -> None:
    run = _load(options)
    from dist_sae.producing.planner import foresee

    with _short_lived(run, "plan") as telemetry:
        _, told = foresee(run, telemetry)
    _print_result(options, told)


def _produce(options: argparse.Namespace) -> int | None:
    run = _load(options)
    from dist_sae.data.work_queue import Worker
    from dist_sae.distributed.local_ranks import rank_environments
    from dist_sae.producing.loop import produce, produce_together
    from dist_sae.telemetry.exporter import Telemetry

    stopping = signals.stop_event()
    if options.local_ranks > 1:
        name = ["--worker", options.worker] if options.worker else []
        arguments = ["produce", "--index", str(options.index), *name]
        environments = rank_environments(options.local_ranks, run.tensor_parallel)
        return _run_ranks(options, run, arguments, environments, stopping)
    worker = Worker(
        options.worker or f"producer-{os.getpid()}@{os.uname().nodename}",
        options.index,
        run.processes.producers,
    )
    port = _port(run.telemetry.port, options.port_offset)
    rank = options.index * run.tensor_parallel + _rank()
    with Telemetry(run.name, "produce", port, rank) as telemetry:
        if options.wait:
            _await_plan(run, stopping)
        work = produce_together if run.tensor_parallel > 1 else produce
        result = work(run, worker, stopping, telemetry)
    _print_result(options, result)
    return None


def _train(options: argparse.Namespace) -> int | None:
    run = _load(options)
    from dist_sae.distributed.local_ranks import rank_environments
    from dist_sae.distributed.mesh import join_mesh
    from dist_sae.distributed.rendezvous import rendezvous
    from dist_sae.distributed.watch import Watch
    from dist_sae.telemetry.exporter import Telemetry
    from dist_sae.training.completed import completed_result
    from dist_sae.training.loop import train

    world = run.processes.trainers
    if world > 1 and (result := completed_result(run)):
        _print_result(options, result)
        return None
    stopping = signals.stop_event()
    if options.local_ranks:
        environments = rank_environments(options.local_ranks, world)
        if options.local_ranks > 1:
            return _run_ranks(options, run, ["train"], environments, stopping)
        os.environ.update(environments[0])
        logs.configure(rank=_rank())
    config, port = run.timeouts, _port(run.telemetry.port, options.port_offset)
    with Telemetry(run.name, "train", port, _rank()) as telemetry:
        telemetry.set("dist_sae_train_ranks", world)  # before they meet: one may not come
        if options.wait:
            _await_plan(run, stopping)
        with (
            rendezvous(world, config.missing_seconds, stopping, name=run.name) as ranks,
            Watch(
                ranks,
                stopping,
                lost_seconds=config.lost_seconds,
                hung_seconds=config.hung_seconds,
            ) as watch,
            _hold(run, stopping),
            join_mesh(ranks, run.processes.latent_shards) as mesh,
        ):
            result = train(run, mesh, watch, stopping, telemetry)
    _print_result(options, result)
    return None


def _hold(run: "Run", stopping: threading.Event) -> AbstractContextManager[object]:
    """The run is this job's alone: its first rank sees to that."""
    from dist_sae.checkpoint.lease import TrainerLease
    from dist_sae.storage import open_store

    if _rank():
        return nullcontext()
    return TrainerLease(
        open_store(run.store.runs, run.store.s3, None, stopping), run.name, stopping
    )


def _await_plan(run: "Run", stopping: threading.Event) -> None:
    """While metrics are served: a process that waits is alive, however long it takes."""
    from dist_sae.commands.waiting import await_plan

    await_plan(run, stopping)


def _run_ranks(
    options: argparse.Namespace,
    run: "Run",
    arguments: list[str],
    environments: list[dict[str, str]],
    stopping: threading.Event,
) -> int:
    """Ranks of this pod as children, with one page of metrics for all of them."""
    from dist_sae.distributed.local_ranks import run_ranks
    from dist_sae.telemetry.gather import GatheredTelemetry

    program, *others = arguments
    overrides = [word for override in options.set for word in ("--set", override)]
    waiting = ["--wait"] if options.wait else []
    command = [program, options.run, *overrides, *waiting, *others]
    with ExitStack() as serving:
        if first := run.telemetry.port:
            before = options.index * run.tensor_parallel if program == "produce" else 0
            ports = {before + int(e["RANK"]): first + 1 + i for i, e in enumerate(environments)}
            serving.enter_context(GatheredTelemetry(run.name, program, ports, first))
        return run_ranks(command, environments, stopping)


def _evaluate(options: argparse.Namespace) -> None:
    run = _load(options)
    from dist_sae.evaluation.evaluate import evaluate

    if options.wait:
        from dist_sae.commands.waiting import await_end

        await_end(run, signals.stop_event())
        signals.heed()
    with _short_lived(run, "evaluate") as telemetry:
        result = evaluate(run, telemetry, options.step)
    _print_result(options, result)


def _export(options: argparse.Namespace) -> None:
    run = _load(options)
    from dist_sae.interop.sae_lens import export

    with _short_lived(run, "export") as telemetry:
        result = export(run, telemetry, options.step)
    _print_result(options, {"export": result})


def _report(options: argparse.Namespace) -> None:
    run = _load(options)
    from dist_sae.report.build import report

    with _short_lived(run, "report") as telemetry:
        result = report(run, telemetry, options.step)
    _print_result(options, {"report": result})


def _run(options: argparse.Namespace) -> None:
    run = _load(options)
    from dist_sae.commands.run import run_locally

    _print_result(options, run_locally(run, options.run, options.set))


def _grouped(options: argparse.Namespace) -> None:
    result = options.program(options, _load(options))
    if isinstance(result, str):
        sys.stdout.write(result)
    elif isinstance(result, Mapping):
        _print_result(options, result)
    else:
        _print_result(options, result.result())
        result.raise_if_bad()


def _render(options: argparse.Namespace) -> None:
    run = _load(options)
    from dist_sae.kubernetes.render import render, to_yaml

    found = render(run, options.only)
    if options.only == "kubernetes" and not options.json:
        sys.stdout.write(to_yaml(found["kubernetes"]))
    else:
        sys.stdout.write(_json(options, found))


def _completion(options: argparse.Namespace) -> None:
    sys.stdout.write(render_completion(command_parser(), options.shell))


def _bench(options: argparse.Namespace) -> None:
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    result = options.bench(options)
    if isinstance(result, str):
        sys.stdout.write(result)
    elif result is not None:
        _print_result(options, result)


def _load(options: argparse.Namespace) -> "Run":
    from dist_sae.checkpoint.folder import open_run

    return open_run(options.run, options.set)


def _short_lived(run: "Run", role: str) -> "Telemetry":
    """The metrics of a program that nobody can scrape."""
    from dist_sae.telemetry.exporter import Telemetry

    return Telemetry(run.name, role, None, pushgateway_url=run.telemetry.pushgateway_url)


def _print_result(options: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """For people, and with --json for programs: one object as the last line of stdout."""
    if options.json:
        sys.stdout.write(_json(options, result))
        return
    from dist_sae.report.shown import shown

    for name, value in result.items():
        if name == "made_from":  # for programs
            continue
        if isinstance(value, Mapping):
            sys.stdout.write(f"{name}\n" if value else "")
            for key, item in value.items():
                unit = name if name.endswith("bytes") else key
                sys.stdout.write(f"  {key:40} {_shown_item(unit, item)}\n")
        elif not isinstance(value, list):
            sys.stdout.write(f"{name:20} {shown(name, value)}\n")


def _shown_item(name: str, item: Any) -> str:
    """A part of a result; a list of two is an interval."""
    from dist_sae.report.shown import shown

    return " to ".join(shown(name, end) for end in (item if isinstance(item, list) else [item]))


def _json(options: argparse.Namespace, content: Mapping[str, Any]) -> str:
    """On one line where a program asked for it, indented for people."""
    return json.dumps(content, indent=None if options.json else 2) + "\n"


def _rank() -> int:
    """Of this process among those that it shares its work with; torchrun's name for it."""
    return int(os.environ.get("RANK", "0"))


def _port(first: int | None, offset: int) -> int | None:
    """The metrics port of one of several processes; 0 stays "any"."""
    return first + offset if first else first


def command_parser() -> argparse.ArgumentParser:
    """The command line: every command with its options."""
    parser = argparse.ArgumentParser(
        prog="dist-sae",
        description="Train sparse autoencoders on language-model activations, "
        "on a laptop or a cluster.",
        epilog="Exit codes: 0 done, 2 something to fix, 75 stopped and resumable, 1 a bug.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(
        name: str, command: Command, text: str, group: Any = commands
    ) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = group.add_parser(name, help=text, description=text)
        sub.add_argument(
            "run", metavar="RUN", help="the run file, or a run's folder: a path or URL"
        )
        sub.add_argument(
            "--set", metavar="KEY=VALUE", action="append", default=[], help="override, as sae.k=64"
        )
        sub.add_argument("--json", action="store_true", help="print the result as one JSON object")
        sub.set_defaults(command=command)
        return sub

    whole = add(
        "run", _run, "do everything on this machine: plan, produce, train, evaluate, export, report"
    )
    add("plan", _plan, "read the corpus and fix which documents make up which unit")
    produce = add("produce", _produce, "run the model over units and store their activations")
    produce.add_argument("--worker", help="name of this producer; unique among those alive")
    produce.add_argument(
        "--index",
        type=int,
        default=int(os.environ.get("JOB_COMPLETION_INDEX", "0")),
        help="its number, below processes.producers; matters where the store has no "
        "conditional writes (default: JOB_COMPLETION_INDEX, else 0)",
    )
    train = add("train", _train, "train, as one rank of those that RANK and WORLD_SIZE name")
    for sub in (whole, train):
        sub.add_argument(
            "--from",
            dest="set",
            action="append",
            type=lambda name: f"train.parent.run={name}",
            metavar="NAME",
            help="go on from another run in store.runs (--set train.parent.run=NAME)",
        )
    for sub in (produce, train):
        sub.add_argument("--port-offset", type=int, default=0, help="added to telemetry.port")
        sub.add_argument(
            "--local-ranks",
            type=int,
            default=0,
            metavar="N",
            help="start N ranks here, those of node JOB_COMPLETION_INDEX (what pods run)",
        )
    evaluate = add("evaluate", _evaluate, "measure a checkpoint on held-out data")
    export = add("export", _export, "write a checkpoint as safetensors that SAELens loads")
    report = add("report", _report, "write one HTML file with a run's curves, numbers and latents")
    for sub in (evaluate, export, report):
        sub.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
    for sub, what in (
        (produce, "the plan"),
        (train, "the plan"),
        (evaluate, "the last checkpoint"),
    ):
        sub.add_argument("--wait", action="store_true", help=f"until {what} is there")
    rendering = add("render", _render, "print what this run implies for other programs")
    rendering.add_argument(
        "--only",
        choices=("deepspeed", "kubernetes", "dashboards"),
        help="kubernetes: as kubectl apply -f - reads it; dashboards: Grafana's",
    )

    add_cluster_commands(add)
    add_benches(commands, _bench)
    add_groups(commands, add, _grouped)
    completion = commands.add_parser("completion", help="print what completes commands in a shell")
    completion.add_argument("shell", choices=SHELLS)
    completion.set_defaults(command=_completion)
    return parser
