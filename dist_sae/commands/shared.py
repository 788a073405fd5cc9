"""Functions shared by commands: options, run files, results, metrics, and local ranks."""

import argparse
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from typing import TYPE_CHECKING, Any

from dist_sae.errors import EXIT_USER, ConfigError, CorruptObjectError, DistSaeError

if TYPE_CHECKING:
    from dist_sae.config import Run
    from dist_sae.endpoint.answers import Endpoint, Question
    from dist_sae.kubernetes.cluster import Cluster
    from dist_sae.storage.lives import Life, Part
    from dist_sae.telemetry.exporter import Telemetry

logger = logging.getLogger(__name__)

Commands = Any
"""The object from `add_subparsers` to which commands are added."""
Main = Callable[[argparse.Namespace], int | None]


def add_command(commands: Commands, name: str, main: Main, text: str) -> argparse.ArgumentParser:
    """Add a command that takes a run, and return its parser, so that the caller can add options."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("run", metavar="RUN", help="run file, or a run's folder (path or URL)")
    add_settings(parser)
    parser.set_defaults(command=main)
    return parser


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add `--set`, `--job` and `--json`."""
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override a setting, for example sae.k=64",
    )
    parser.add_argument("--job", metavar="NAME", help="use only this job of a sweep")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def add_group(commands: Commands, name: str, text: str, metavar: str = "ACTION") -> Commands:
    """Add a command that has subcommands, and return the object to add them to."""
    parser = commands.add_parser(name, help=text, description=text)
    return parser.add_subparsers(metavar=metavar, required=True)


def add_step(parser: argparse.ArgumentParser) -> None:
    """Add `--step`, the checkpoint to use."""
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")


def add_ranks(parser: argparse.ArgumentParser) -> None:
    """Add the options of programs that run as several ranks."""
    parser.add_argument(
        "--port-offset", type=int, default=0, help="number to add to telemetry.port"
    )
    parser.add_argument(
        "--local-ranks",
        type=int,
        default=0,
        metavar="N",
        help="start N ranks here, those of node JOB_COMPLETION_INDEX (used by pods)",
    )


def add_wait(parser: argparse.ArgumentParser, what: str) -> None:
    """Add `--wait`."""
    parser.add_argument("--wait", action="store_true", help=f"wait for {what}")


def add_endpoint(parser: argparse.ArgumentParser) -> None:
    """Add `--endpoint` and `--yes`."""
    parser.add_argument(
        "--endpoint",
        metavar="FILE",
        help="YAML file with url and model of an OpenAI-compatible endpoint, and optionally "
        "tokenizer, input_price, output_price, concurrency, parameters; the API key is read from "
        "OPENAI_API_KEY, or from the variable that key_variable names",
    )
    parser.add_argument(
        "--yes",
        action="store_true",
        help="send the requests; without it, only an estimate of their number, tokens and price is "
        "printed",
    )


def open_endpoint(options: argparse.Namespace, run: "Run", file: str | None = None) -> "Endpoint":
    """Open a language model's endpoint, whose answers are cached in the run's folder.

    Args:
        options: Options of the command, with `--endpoint`.
        run: The run.
        file: Endpoint file to use instead of `--endpoint`.

    Raises:
        ConfigError: No endpoint is given, or its file is not valid.
    """
    from dist_sae.endpoint.answers import Endpoint
    from dist_sae.endpoint.settings import read_endpoint
    from dist_sae.storage import open_store

    file = file or options.endpoint
    if file is None:
        raise ConfigError(
            "--endpoint: missing; give a YAML file with the url and model of an endpoint"
        )
    store = open_store(run.store.runs, run.store.s3)
    return Endpoint(read_endpoint(file), store, f"{run.name}/answers")


def confirm_requests(
    options: argparse.Namespace, endpoint: "Endpoint", questions: "Sequence[Question]"
) -> bool:
    """Return True if the questions may be sent: with `--yes`, or if all answers are cached.

    Logs an estimate of the cost. If False, prints the estimate as the command's only result.
    """
    estimate = endpoint.estimate(questions)
    may = options.yes or not estimate.requests
    line = estimate.sentence(endpoint.url)
    if may:
        logger.info("%s", line)
    else:
        lines = [line, "nothing was sent; add --yes to send the requests"]
        print_lines(options, {"estimate": estimate._asdict()}, lines)
    return may


def add_parent(parser: argparse.ArgumentParser) -> None:
    """Add `--from`."""
    parser.add_argument(
        "--from",
        dest="set",
        action="append",
        type=lambda name: f"train.parent.run={name}",
        metavar="NAME",
        help="continue another run of store.runs (same as --set train.parent.run=NAME)",
    )


def add_ignore_nodes(parser: argparse.ArgumentParser) -> None:
    """Add `--ignore-nodes`."""
    parser.add_argument(
        "--ignore-nodes",
        action="store_true",
        help="submit even if the pods fit on no current node",
    )


def load_run_or_sweep(options: argparse.Namespace) -> "Run":
    """Read the run or the sweep that the command line names.

    Raises:
        ConfigError: `--job` does not name a job of a sweep.
    """
    from dist_sae.checkpoint.run_folder import open_run
    from dist_sae.config import jobs_of

    run = open_run(options.run, options.set)
    if options.job is None:
        return run
    if run.sweep is None:
        raise ConfigError(f"--job {options.job}: {options.run} is not a sweep; leave --job out")
    names = list(run.sweep.overrides())
    if options.job not in names:
        raise ConfigError(f"--job {options.job}: {options.run} has the jobs {', '.join(names)}")
    return jobs_of(run)[names.index(options.job)]


def load(options: argparse.Namespace) -> "Run":
    """Read the one run that the command line names.

    Raises:
        ConfigError: The run file describes a sweep, and no job is named.
    """
    run = load_run_or_sweep(options)
    if run.sweep:
        names = ", ".join(run.sweep.overrides())
        raise ConfigError(f"{options.run}: is a sweep; name a job with --job: {names}")
    return run


def load_several(options: argparse.Namespace) -> "tuple[str, list[Run]]":
    """Read all runs that the command line names, with each job of a sweep as a run.

    Returns:
        Name of the first run or sweep, in whose folder findings are stored; and the runs.
    """
    from dist_sae.checkpoint.run_folder import open_run
    from dist_sae.config import jobs_of

    first = load_run_or_sweep(options)
    others = [open_run(place, options.set) for place in options.others]
    return first.name, [job for run in (first, *others) for job in jobs_of(run)]


def load_for_device(options: argparse.Namespace) -> "Run":
    """Read the run or the sweep, and apply `processes.device` to this process.

    Raises:
        ConfigError: The run requires a GPU, and none can be used.
    """
    run = load_run_or_sweep(options)
    from dist_sae.device import apply_device_setting

    if warning := apply_device_setting(run.processes.device):
        logger.warning("%s", warning)
    return run


def open_cluster(options: argparse.Namespace) -> tuple["Run", "Cluster"]:
    """Read the run or the sweep, and open its namespace on the cluster."""
    run = load_run_or_sweep(options)
    from dist_sae.kubernetes.cluster import Cluster

    return run, Cluster(run.cluster)


def pushed_telemetry(run: "Run", role: str) -> "Telemetry":
    """Return metrics that are pushed, for a program that may end before it is scraped."""
    from dist_sae.telemetry.exporter import Telemetry

    return Telemetry(run.name, role, None, pushgateway_url=run.telemetry.pushgateway_url)


def this_life(run: "Run", part: "Part", stopping: threading.Event) -> "Life":
    """Return this process's life, which is counted if the process runs in a pod."""
    from dist_sae.storage import open_store
    from dist_sae.storage.lives import this_life

    return this_life(run, part, open_store(run.store.runs, run.store.s3, None, stopping))


def stop_if_peer_failed(run: "Run", stopping: threading.Event) -> AbstractContextManager[None]:
    """Stop if another part of the run fails permanently and no controller ends all parts."""
    from dist_sae.storage.failure import stop_if_peer_failed

    return stop_if_peer_failed(run, stopping)


def notify_failure(options: argparse.Namespace, error: DistSaeError) -> None:
    """In a pod, notify the other parts of the run of an error that fails this part permanently."""
    from dist_sae.storage.failure import ATTEMPT, report_failure

    if ATTEMPT in os.environ and error.exit_code == EXIT_USER:
        with suppress(DistSaeError):  # of the run file, which the other parts cannot read either
            report_failure(load_run_or_sweep(options), error)


def rank() -> int:
    """Return the rank of this process in its job, from the variable that torchrun sets."""
    return int(os.environ.get("RANK", "0"))


def metrics_port(run: "Run", options: argparse.Namespace) -> int | None:
    """Return this process's metrics port. 0 (any free port) stays 0."""
    first: int | None = run.telemetry.port
    return first + options.port_offset if first else first


def run_local_ranks(
    options: argparse.Namespace,
    run: "Run",
    arguments: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    stopping: threading.Event,
    first_rank: int = 0,
) -> int:
    """Run this pod's ranks as children, and serve the metrics of all ranks on one page.

    Args:
        options: Options of this process. The ranks get the same run, overrides and `--wait`.
        run: The run.
        arguments: Name of the command, and its other options.
        environments: Environment variables of each rank.
        stopping: Event that makes all ranks save and exit.
        first_rank: Number added to `RANK` in the labels of the metrics.

    Returns:
        The exit code.

    Raises:
        ConfigError: There are GPUs, but fewer than ranks.
    """
    from dist_sae.device import check_gpus
    from dist_sae.distributed.local_ranks import run_ranks
    from dist_sae.telemetry.gather import GatheredTelemetry

    check_gpus("--local-ranks", len(environments))
    program, *others = arguments
    overrides = [word for override in options.set for word in ("--set", override)]
    waiting = ["--wait"] if options.wait else []
    job = ["--job", options.job] if options.job else []
    command = [program, options.run, *overrides, *job, *waiting, *others]
    with ExitStack() as serving:
        if port := run.telemetry.port:
            ports = {
                first_rank + int(environment["RANK"]): port + 1 + i
                for i, environment in enumerate(environments)
            }
            serving.enter_context(GatheredTelemetry(run.name, program, ports, port))
        return run_ranks(command, environments, stopping)


def line_writer(options: argparse.Namespace) -> Callable[[str], None]:
    """Return a function that prints lines for people: to stderr with `--json`, else to stdout."""
    stream = sys.stderr if options.json else sys.stdout

    def write(line: str) -> None:
        stream.write(line + "\n")
        stream.flush()

    return write


def print_json(options: argparse.Namespace, content: Any) -> None:
    """Print JSON: on one line with `--json`, otherwise indented."""
    sys.stdout.write(json.dumps(content, indent=None if options.json else 2) + "\n")


def print_lines(options: argparse.Namespace, content: Any, lines: Sequence[str]) -> None:
    """Print the lines, or with `--json` the content as JSON."""
    if options.json:
        print_json(options, content)
    else:
        sys.stdout.writelines(f"{line}\n" for line in lines)


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table, with the first column aligned left and the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *others = (
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join([first, *others]).rstrip()


def raise_if_bad(url: str, remedy: str, faults: Iterable[str]) -> None:
    """Raise a `CorruptObjectError` with one line per fault, if there are any."""
    if faults := list(faults):
        raise CorruptObjectError("\n".join([remedy, *faults]), url=url)


def print_results(
    options: argparse.Namespace, run: "Run", work: "Callable[[Run], Mapping[str, Any] | None]"
) -> None:
    """Call `work` on the run, or on each job of a sweep in turn, and print the results.

    Args:
        options: Options of the command.
        run: The run or the sweep.
        work: Function that returns names and values, or None if there is nothing to print.
    """
    from dist_sae.config import jobs_of

    results = {job.name: result for job in jobs_of(run) if (result := work(job)) is not None}
    if run.sweep is None:
        for result in results.values():
            print_result(options, result)
    elif results and options.json:
        print_json(options, results)
    else:
        for name, result in results.items():
            sys.stdout.write(f"{name}\n")
            print_result(options, result)


def print_result(options: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Print names and values; with `--json`, one JSON object as the last line of stdout."""
    if options.json:
        print_json(options, result)
        return
    from dist_sae.report.formatting import format_result

    for name, value in result.items():
        if name == "made_from":  # for programs
            continue
        if isinstance(value, Mapping):
            sys.stdout.write(f"{name}\n" if value else "")
            for key, item in value.items():
                if isinstance(item, Mapping):
                    text = ", ".join(f"{each} {format_result(each, x)}" for each, x in item.items())
                else:
                    unit = name if name.endswith("bytes") else key
                    ends = item if isinstance(item, list) else [item]  # two are an interval
                    text = " to ".join(format_result(unit, end) for end in ends)
                sys.stdout.write(f"  {key:40} {text}\n")
        elif not isinstance(value, list):
            sys.stdout.write(f"{name:20} {format_result(name, value)}\n")
