"""Processes that start in milliseconds, forked from a server that has imported everything."""

import io
import multiprocessing
import os
import subprocess
import sys
from multiprocessing.connection import Connection
from threading import Thread

import torch

HANG_SECONDS = 900.0
"""Time after which a process counts as hanging. No test takes this long, even on a busy machine."""
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.forks_preload"])


class Program:
    """A `dist-sae` process. Has the interface of `subprocess.Popen` with text pipes."""

    def __init__(self, arguments: tuple[str, ...], env: dict[str, str]) -> None:
        (stdin, self._stdin), (out, stdout), (err, stderr) = (
            processes.Pipe(duplex=False) for _ in range(3)
        )
        self._process = processes.Process(
            target=_main, args=(arguments, env, stdin, stdout, stderr), daemon=True
        )
        self._process.start()
        for end in (stdin, stdout, stderr):
            end.close()
        self.stdout, self.stderr = _reader(out), _reader(err)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("dist-sae", timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        said: dict[str, str] = {}
        readers = [
            Thread(target=lambda name, file: said.update({name: file.read()}), args=item)
            for item in (("out", self.stdout), ("err", self.stderr))
        ]
        for reader in readers:
            reader.start()
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            for reader in readers:
                reader.join()
            self._stdin.close()
            self.stdout.close()
            self.stderr.close()
        return said["out"], said["err"]


def _reader(end: Connection) -> io.TextIOWrapper:
    return os.fdopen(os.dup(end.fileno()), "r")


def _main(
    arguments: tuple[str, ...],
    env: dict[str, str],
    stdin: Connection,
    stdout: Connection,
    stderr: Connection,
) -> None:
    os.environ.clear()
    os.environ.update(env)
    # daemons end with the test's process, but may not start processes unless this is reset
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined] # noqa: SLF001
    for number, end in enumerate((stdin, stdout, stderr)):
        os.dup2(end.fileno(), number)
        end.close()
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    torch.set_num_threads(1)
    from dist_sae.commands.cli import main  # the fork server has imported it

    sys.exit(main(arguments))
