"""`dist-sae run`: a whole run on this machine, as the processes that a cluster would run.

plan -> producers and trainer ranks, side by side -> evaluate -> export -> report
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dist_sae.checkpoint.folder import run_file_key
from dist_sae.config import Run
from dist_sae.config.base import folder_of
from dist_sae.distributed.local_ranks import rank_environments
from dist_sae.errors import (
    EXIT_BUG,
    EXIT_RESUMABLE,
    EXIT_USER,
    AccessError,
    ProcessFailedError,
    Stopped,
)
from dist_sae.logs import SUPERVISED
from dist_sae.storage import open_store
from dist_sae.training.progress import ProgressView

_WARNING = re.compile(r"\S+ (WARNING|ERROR) dist_sae\S*: (.+)")  # as `logs` has them
_POLL_SECONDS = 0.05
_GRACE_SECONDS = 60.0  # to finish a step and save, when the user asks to stop
_FAILED_GRACE_SECONDS = 5.0  # for the others when one process has failed: ranks may hang without it


def run_locally(run: Run, path: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Do everything that the run file asks for; goes on where an earlier start stopped.

    Args:
        run: The run.
        path: Its file.
        overrides: The `--set` options it was loaded with.

    Returns:
        The evaluation, and where the exported dictionary (if SAELens has its kind) and the report
        are.

    Raises:
        Stopped: On Ctrl-C or SIGTERM, after everything was saved.
        ProcessFailedError: A process failed; the message is its own.
    """
    arguments = [path, *(argument for override in overrides for argument in ("--set", override))]
    logs = _log_folder(run)
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise AccessError(f"{exc.strerror}; correct store.runs", url=str(logs)) from exc
    with _stop_requests() as stopping, ProgressView() as view:
        job = _Job(arguments, logs, stopping, view)
        if not _is_complete(run, stopping):
            job.run_together([job.process("plan", "plan")])
            job.run_together(_workers(run, job))
        results: dict[str, Any] = {}
        for command in ("evaluate", "export", "report"):
            if command == "export" and run.sae.kind == "routed":  # SAELens has nothing like it
                continue
            process = job.process(command, command, "--json")
            job.run_together([process])
            results |= process.result
    return results


def _is_complete(run: Run, stopping: threading.Event) -> bool:
    """Whether all units are made and the last step is done."""
    runs = open_store(run.store.runs, run.store.s3, None, stopping)
    if runs.size(run_file_key(run.name)) is None:  # training has not begun
        return False
    from dist_sae.training.completed import all_units_exist, completed_result  # takes 3 s

    return completed_result(run) is not None and all_units_exist(run)


def _workers(run: Run, job: "_Job") -> list["_Process"]:
    """Producers and trainer ranks, with the cores shared out among them."""
    producers, trainers = run.processes.producers, run.processes.trainers
    each = run.model_shards  # processes of a producer
    n = producers * each + trainers
    threads = run.processes.threads or max(1, (os.cpu_count() or 1) // n)
    common = {"OMP_NUM_THREADS": str(threads)}
    producing = [
        job.process(
            f"producer-{i}" if each == 1 else f"producer-{i}-{rank}",
            "produce",
            "--worker",
            f"{run.name}-producer-{i}",
            "--index",
            str(i),
            "--port-offset",
            str(i * each + rank),
            env=common | rendezvous,
        )
        for i in range(producers)
        for rank, rendezvous in enumerate(rank_environments(each, each))
    ]
    training = [
        job.process(
            f"trainer-{rank}",
            "train",
            "--port-offset",
            str(producers * each + rank),
            env=common | rendezvous,
        )
        for rank, rendezvous in enumerate(rank_environments(trainers, trainers))
    ]
    return producing + training


class _Process:
    """A child: its progress is shown, its words to a log file.

    It holds one end of a pipe as its stdin; when this program dies, the pipe closes and the
    child stops by itself.
    """

    def __init__(self, name: str, command: list[str], env: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        self.result: dict[str, Any] = {}
        self._command = command
        self._env = dict(os.environ) | {SUPERVISED: "1"} | dict(env)
        self._process: subprocess.Popen[str] | None = None
        self._readers: list[threading.Thread] = []
        self._words: list[str] = []

    def start(self, view: ProgressView) -> None:
        """Start it, in a session of its own: Ctrl-C reaches this program, which passes it on."""
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=self._env,
            start_new_session=True,
        )
        self._readers = [
            threading.Thread(target=self._read_stdout, args=(view,), daemon=True),
            threading.Thread(target=self._read_stderr, args=(view,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def poll(self) -> int | None:
        """Its exit code once it has ended."""
        assert self._process is not None
        return self._process.poll()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it still lives."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def close(self) -> None:
        """Wait for its last words."""
        if self._process is not None:
            self._process.wait()
            for reader in self._readers:
                reader.join()
            for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
                assert pipe is not None
                pipe.close()

    def failure(self) -> ProcessFailedError:
        """What it said when it failed, and what exit code that makes for the whole."""
        code = self.poll()
        assert code is not None
        if said := self.said:
            return ProcessFailedError("\n".join(f"{self.name}: {line}" for line in said), code)
        if code < 0:
            name = signal.Signals(-code).name
            return ProcessFailedError(
                f"{self.name}: killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}; "
                f"its log is {self.log}; start again to go on",
                EXIT_RESUMABLE,
            )
        last = next(
            (line.strip() for line in reversed(self._words) if line.strip()), "it said nothing"
        )
        return ProcessFailedError(f"{self.name}: {last}; its log is {self.log}", EXIT_BUG)

    @property
    def said(self) -> list[str]:
        """Its errors."""
        words = [line for line in self._words if line.startswith("error: ")]
        return [line.removeprefix("error: ").rstrip() for line in words]

    @property
    def spoke_for_itself(self) -> bool:
        """Whether it ended with an error of its own, not because another one was gone."""
        return self.poll() == EXIT_USER

    def _read_stdout(self, view: ProgressView) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                record = json.loads(line)
            except ValueError:
                self._words.append(line)
                continue
            if "role" in record:
                with suppress(OSError):
                    view.show(self.name, record)
            else:
                self.result = record

    def _read_stderr(self, view: ProgressView) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._words.append(line)
            del self._words[:-200]
            with suppress(OSError), self.log.open("a", encoding="utf-8") as file:
                file.write(line)  # a full disk must not keep us from hearing the rest
            if warning := _WARNING.match(line):
                with suppress(OSError):  # nor must a terminal that is gone
                    view.warn(*warning.groups())


class _Job:
    """Starts processes, watches them, and ends them together."""

    def __init__(
        self, arguments: list[str], logs: Path, stopping: threading.Event, view: ProgressView
    ) -> None:
        self._arguments = arguments
        self._logs = logs
        self._stopping = stopping
        self._view = view

    def process(
        self, name: str, command: str, *options: str, env: Mapping[str, str] | None = None
    ) -> _Process:
        line = [sys.executable, "-m", "dist_sae", command, *self._arguments, *options]
        return _Process(name, line, env or {}, self._logs / f"{name}.log")

    def run_together(self, processes: list[_Process]) -> None:
        """Run processes side by side until all have ended.

        Raises:
            ProcessFailedError: One failed; the others have been ended.
            Stopped: The user asked to stop; all have saved and ended.
        """
        if len(processes) == 1:
            self._view.begin(processes[0].name)
        try:
            for process in processes:
                process.start(self._view)
            first = self._watch(processes)
        finally:
            for process in processes:
                process.signal(signal.SIGKILL)
            for process in processes:
                process.close()
        first = [p for p in first if p.poll() != EXIT_RESUMABLE or p.said]
        failed = [p for p in processes if p.poll() not in (0, EXIT_RESUMABLE)]
        spoke = [p for p in failed if p.spoke_for_itself]
        if spoke or first:
            raise (spoke or first)[0].failure()
        if failed:  # they did not heed the signal in time; what was saved before is safe
            names = ", ".join(p.name for p in failed)
            raise Stopped(f"{names} did not end in time; start the same command again to go on")
        if any(p.poll() == EXIT_RESUMABLE for p in processes) or self._stopping.is_set():
            raise Stopped("everything is saved; start the same command again to go on")

    def _watch(self, processes: list[_Process]) -> list[_Process]:
        """Until all have ended by themselves, or their time to do so is up.

        Returns:
            Those that had failed, or else stopped, before any was told to end: whose fault it is.
        """
        first: list[_Process] = []
        deadline = float("inf")
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            failed = [p for p in processes if p.poll() not in (None, 0, EXIT_RESUMABLE)]
            ended_early = any(p.poll() == EXIT_RESUMABLE for p in processes)
            if failed or ended_early or self._stopping.is_set():
                grace = _FAILED_GRACE_SECONDS if failed else _GRACE_SECONDS
                if deadline == float("inf"):
                    first = failed or [p for p in processes if p.poll() == EXIT_RESUMABLE]
                    for process in processes:
                        process.signal(signal.SIGTERM)
                deadline = min(deadline, time.monotonic() + grace)
            time.sleep(_POLL_SECONDS)
        return first or [
            p
            for p in processes
            if deadline == float("inf") and p.poll() not in (None, 0, EXIT_RESUMABLE)
        ]


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, for as long as the context lasts."""
    stopping = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: stopping.set()) for number in numbers]
    try:
        yield stopping
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _log_folder(run: Run) -> Path:
    """Beside the run's other files, or in the current folder where they are not on this disk."""
    if folder := folder_of(run.store.runs):
        return Path(folder) / run.name / "logs"
    return Path(f"{run.name}-logs")
