"""A whole run on this machine, with the same processes as on a cluster.

plan -> producers and trainer ranks at the same time -> index -> evaluate -> export -> report
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

from dist_sae.checkpoint.run_folder import run_file_key
from dist_sae.config import Run, jobs_of
from dist_sae.config.base import folder_of
from dist_sae.device import check_gpus, share_gpus
from dist_sae.distributed.local_ranks import rank_environments
from dist_sae.distributed.supervisor import start, supervise
from dist_sae.errors import (
    EXIT_BUG,
    EXIT_RESUMABLE,
    EXIT_USER,
    AccessError,
    ProcessFailedError,
    Stopped,
)
from dist_sae.interop import sae_lens
from dist_sae.logs import SUPERVISED
from dist_sae.storage import open_store
from dist_sae.training.progress import ProgressView

_WARNING = re.compile(r"\S+ (WARNING|ERROR) dist_sae\S*: (.+)")  # the format of `dist_sae.logs`
GRACE_SECONDS = 60.0  # to finish a step and save, when the user asks to stop
FAILED_GRACE_SECONDS = 5.0  # for the others after a failure; ranks may hang without the failed one


def run_locally(
    run: Run, arguments: Sequence[str], stopping: threading.Event
) -> dict[str, dict[str, Any]]:
    """Do all parts of a run, continuing where an earlier call stopped.

    Args:
        arguments: Command-line arguments with the run file and the options that it was loaded with.
        stopping: Event that makes all processes save and exit.

    Returns:
        Results by the run's name; a sweep has several runs. Results are the evaluation, the
        location of the report, and that of the export if SAELens supports the kind.

    Raises:
        Stopped: `stopping` was set, and everything is saved.
        ProcessFailedError: A process failed, with the message of that process. Complete jobs of a
            sweep have still been evaluated.
        ConfigError: There are fewer GPUs than ranks that need one each.
    """
    _check_gpus(run)
    logs = _log_folder(run)
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise AccessError(f"{exc.strerror}; correct store.runs", url=str(logs)) from exc
    with ProgressView() as view:

        def child(
            name: str, command: str, *own: object, options: Sequence[str] = (), **env: str
        ) -> Child:
            line = [sys.executable, "-m", "dist_sae", command, *arguments, *options, *map(str, own)]
            return Child(name, line, env, logs / f"{name}.log", view)

        jobs = dict(zip(run.sweep.overrides() if run.sweep else [""], jobs_of(run), strict=True))
        complete = _complete(run, jobs, stopping)
        trained, failure = complete == list(jobs), None
        if not trained:
            run_together([child("plan", "plan")], stopping, view)
            try:
                run_together(_workers(run, child), stopping, view)
                complete = list(jobs)
            except ProcessFailedError as exc:
                failure, complete = exc, _complete(run, jobs, stopping) if run.sweep else []
                if not complete:
                    raise
        results: dict[str, dict[str, Any]] = {}
        for name in complete:
            job = jobs[name]
            of_job = ["--job", name] if name else []
            if run.index.workers and not (trained and _is_indexed(job, stopping)):
                title = f"index {name}".strip()
                run_together(_indexers(job, partial(child, options=of_job)), stopping, view, title)
            results[job.name] = _measure(job, partial(child, options=of_job), stopping, view)
        if failure:
            raise failure
    return results


def _measure(
    run: Run, child: Callable[..., "Child"], stopping: threading.Event, view: ProgressView
) -> dict[str, Any]:
    """Evaluate, export and report a trained run, and return the results."""
    results: dict[str, Any] = {}
    for command in ("evaluate", "export", "report"):
        if command == "export" and sae_lens.problem(run):
            continue
        ranks = run.tensor_parallel if command == "evaluate" else 1
        ranks = ranks if run.sae.can_shard_over(ranks) else 1
        threads = _threads(run, ranks) if ranks > 1 else {}
        programs = [
            child(f"{command}-{rank}" if rank else command, command, "--json", **env, **threads)
            for rank, env in enumerate(rank_environments(ranks, ranks))
        ]
        run_together(programs, stopping, view)
        results |= programs[0].result
    return results


def _complete(run: Run, jobs: Mapping[str, Run], stopping: threading.Event) -> list[str]:
    """Return the jobs that are trained to the last step, or none if a unit is missing.

    This does not check the index; see `_is_indexed`.
    """
    runs = open_store(run.store.runs, run.store.s3, None, stopping)
    if runs.size(run_file_key(run.name)) is None:  # training has not begun
        return []
    from dist_sae.training.completed import all_units_exist, completed_result  # takes 3 s

    complete = [name for name, job in jobs.items() if completed_result(job) is not None]
    return complete if complete and all_units_exist(run) else []


def _is_indexed(run: Run, stopping: threading.Event) -> bool:
    from dist_sae.index.progress import is_indexed  # takes 3 s unless `_complete` has imported it

    return is_indexed(run, stopping)


def _check_gpus(run: Run) -> None:
    """Check that ranks that exchange tensors have a GPU each. Other processes may share a GPU."""
    check_gpus("processes.trainers", run.processes.trainers)
    check_gpus("model.tensor_parallel", run.tensor_parallel)
    if run.index.workers:
        check_gpus("index.latent_shards", run.index.latent_shards)


def _workers(run: Run, child: Callable[..., "Child"]) -> list["Child"]:
    """Return the producers and trainer ranks, which share the cores and the GPUs."""
    producers, trainers = run.processes.producers, run.processes.trainers
    each = run.tensor_parallel  # processes per producer
    n = producers * each + trainers
    common = _threads(run, n)
    of_trainers, *of_producers = share_gpus([trainers, *[each] * producers])
    children = []
    for i, gpus in enumerate(of_producers):
        worker = f"{run.name}-producer-{i}"
        for rank, rendezvous in enumerate(rank_environments(each, each)):
            name = f"producer-{i}" if each == 1 else f"producer-{i}-{rank}"
            which = "--worker", worker, "--index", i, "--port-offset", i * each + rank
            children.append(child(name, "produce", *which, **common, **gpus, **rendezvous))
    for rank, rendezvous in enumerate(rank_environments(trainers, trainers)):
        port = "--port-offset", producers * each + rank
        of_rank = common | of_trainers | rendezvous
        children.append(child(f"trainer-{rank}", "train", *port, **of_rank))
    return children


def _indexers(run: Run, child: Callable[..., "Child"]) -> list["Child"]:
    """Return the workers of the latent index, which share the cores and the GPUs."""
    workers, each = run.index.workers, run.index.latent_shards
    common = _threads(run, workers * each)
    children = []
    for i, gpus in enumerate(share_gpus([each] * workers)):
        worker = f"{run.name}-index-{i}"
        for rank, rendezvous in enumerate(rank_environments(each, each)):
            name = f"index-{i}" if each == 1 else f"index-{i}-{rank}"
            which = "--worker", worker, "--index", i, "--port-offset", i * each + rank
            children.append(child(name, "index", *which, **common, **gpus, **rendezvous))
    return children


def _threads(run: Run, processes: int) -> dict[str, str]:
    """Return the environment variable that gives each of n processes its share of the cores."""
    threads = run.processes.threads or max(1, (os.cpu_count() or 1) // processes)
    return {"OMP_NUM_THREADS": str(threads)}


class Child:
    """A process of a local run. Its progress goes to the view, its messages to a log file.

    Args:
        name: Name of the process in the view and in error messages.
        command: The command line.
        environment: Environment variables to add to those of this process.
        log: Path of the log file.
        view: The view of all processes' progress.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        view: ProgressView,
    ) -> None:
        self.name = name
        self.result: dict[str, Any] = {}
        self._command = command
        self._environment = {SUPERVISED: "1", **environment}
        self._log = log
        self._view = view
        self._process: subprocess.Popen[str] | None = None
        self._readers: list[threading.Thread] = []
        self._messages: list[str] = []

    def start(self) -> "subprocess.Popen[str]":
        """Start the process, and threads that read its output."""
        pipe = subprocess.PIPE
        options = {"stdout": pipe, "stderr": pipe, "text": True, "errors": "replace"}
        self._process = process = start(self._command, self._environment, **options)
        assert process.stdout is not None
        assert process.stderr is not None
        self._readers = [
            threading.Thread(target=self._read_stdout, args=(process.stdout,), daemon=True),
            threading.Thread(target=self._read_stderr, args=(process.stderr,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        return process

    def close(self) -> None:
        """Read the output to its end, and close the pipes."""
        for reader in self._readers:
            reader.join()
        if self._process is not None:
            for pipe in (self._process.stdout, self._process.stderr):
                assert pipe is not None
                pipe.close()

    def failure(self, code: int) -> ProcessFailedError:
        """Return the error that the process printed, or an error about how it ended.

        Args:
            code: Exit code of the process.
        """
        if errors := self.errors:
            return ProcessFailedError("\n".join(f"{self.name}: {line}" for line in errors), code)
        if code < 0:
            name = signal.Signals(-code).name
            return ProcessFailedError(
                f"{self.name}: killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}; "
                f"its log is {self._log}; start again to continue",
                EXIT_RESUMABLE,
            )
        last = next(
            (line.strip() for line in reversed(self._messages) if line.strip()),
            "it printed nothing",
        )
        return ProcessFailedError(f"{self.name}: {last}; its log is {self._log}", EXIT_BUG)

    @property
    def errors(self) -> list[str]:
        """The error messages that the process printed."""
        lines = [line for line in self._messages if line.startswith("error: ")]
        return [line.removeprefix("error: ").rstrip() for line in lines]

    def _read_stdout(self, stdout: IO[str]) -> None:
        for line in stdout:
            try:
                record = json.loads(line)
            except ValueError:
                self._messages.append(line)
                continue
            if "role" in record:
                with suppress(OSError):
                    self._view.show(self.name, record)
            else:
                self.result = record

    def _read_stderr(self, stderr: IO[str]) -> None:
        for line in stderr:
            self._messages.append(line)
            del self._messages[:-200]
            with suppress(OSError), self._log.open("a", encoding="utf-8") as file:
                file.write(line)  # if the disk is full, continue to read
            if warning := _WARNING.match(line):
                with suppress(OSError):  # the terminal may be closed
                    self._view.warn(*warning.groups())


def run_together(
    children: Sequence[Child],
    stopping: threading.Event,
    view: ProgressView,
    name: str | None = None,
) -> None:
    """Run children at the same time until all have ended.

    Args:
        children: The children, not started yet.
        stopping: Event that makes all children save and exit.
        view: The view of the children's progress.
        name: What the children do, shown when they start. Not needed for a single child.

    Raises:
        ProcessFailedError: A child failed, and the others have been ended.
        Stopped: The user asked to stop, and all children have ended.
    """
    if name or len(children) == 1:
        view.begin(name or children[0].name)
    try:
        ends = supervise(
            [child.start for child in children],
            stopping,
            failed_grace_seconds=FAILED_GRACE_SECONDS,
            stop_grace_seconds=GRACE_SECONDS,
        )
    finally:
        for child in children:
            child.close()
    failed = [end for end in ends if end.failed]
    mistakes = [end for end in failed if end.code == EXIT_USER]
    causes = [end for end in failed if not end.stop_requested] or [
        end
        for end in ends
        if end.code == EXIT_RESUMABLE and not end.stop_requested and children[end.child].errors
    ]
    if blamed := mistakes or causes:
        raise children[blamed[0].child].failure(blamed[0].code)
    if failed:  # they did not end in time after the signal; earlier checkpoints are safe
        names = ", ".join(children[end.child].name for end in failed)
        raise Stopped(f"{names} did not exit in time; start the same command again to continue")
    if stopping.is_set() or any(end.code for end in ends):
        raise Stopped("everything is saved; start the same command again to continue")


def _log_folder(run: Run) -> Path:
    """Return the folder for logs: in the run's folder, or in the current one if that is on S3."""
    if folder := folder_of(run.store.runs):
        return Path(folder) / run.name / "logs"
    return Path(f"{run.name}-logs")
