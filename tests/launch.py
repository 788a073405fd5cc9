"""Real programs as processes, started as by `dist-sae run` and on a cluster."""

import fcntl
import json
import os
import signal
from pathlib import Path

from dist_sae.distributed.local_ranks import rank_environments
from dist_sae.logs import SUPERVISED
from tests.forks import HANG_SECONDS, Program


def start(*arguments: str, env: dict[str, str] | None = None) -> Program:
    """Start `dist-sae` with one thread. It ends when this process dies."""
    return Program(arguments, os.environ | {"OMP_NUM_THREADS": "1", SUPERVISED: "1"} | (env or {}))


def run(*arguments: str, env: dict[str, str] | None = None, code: int = 0) -> str:
    """Run `dist-sae` to its end. Returns stdout, or stderr if a failure is expected."""
    process = start(*arguments, env=env)
    out, err = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == code, err[-3000:]
    return err if code else out


def produce(path: Path, *options: str) -> None:
    """Plan and produce the whole activation set."""
    run("plan", str(path), *options)
    run("produce", str(path), *options)


def start_ranks(*arguments: str, world: int) -> list[Program]:
    """Start the ranks of one job."""
    return [start(*arguments, env=env) for env in rank_environments(world, world)]


def keep_close(process: Program) -> None:
    """Let a program write at most two pages more than has been read of its output.

    A program that logs every step then makes only a few more steps, however late it is stopped.
    """
    fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)


def train(path: Path, *options: str, world: int = 1, stop_at: int | None = None) -> list[str]:
    """Train with `world` ranks. With `stop_at`, send SIGTERM to rank 0 when it reports that step.

    Returns:
        Each rank's stderr.
    """
    options = ("--set", f"processes.trainers={world}", *options)
    ranks = start_ranks("train", str(path), *options, world=world)
    if stop_at is not None:
        keep_close(ranks[0])
        for line in ranks[0].stdout:
            if line.startswith("{") and json.loads(line)["done"] >= stop_at:
                ranks[0].send_signal(signal.SIGTERM)
                break
    errors = [process.communicate(timeout=HANG_SECONDS)[1] for process in ranks]
    expected = 0 if stop_at is None else 75
    assert [p.returncode for p in ranks] == [expected] * world, "\n".join(e[-2000:] for e in errors)
    return errors
