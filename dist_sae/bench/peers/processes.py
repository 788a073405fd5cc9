"""Runner for scripts in a peer's Python, with a JSON file as input and the last line as output."""

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from dist_sae.bench.peers.environments import Peer, PeerError, last_line

RUN_LIMIT_SECONDS = 4 * 3600

_PACKAGES = Path(__file__).parents[3]


def run_script(
    peer: Peer,
    python: Path,
    script: Path,
    spec: Mapping[str, Any],
    work: Path,
    *,
    threads: int,
    ranks: Sequence[Mapping[str, str]] = ({},),
    limit_seconds: float = RUN_LIMIT_SECONDS,
) -> dict[str, Any]:
    """Run a script in one or more processes. Returns the JSON object on the first one's last line.

    Args:
        peer: The peer that the script belongs to.
        python: The peer's Python.
        script: Script that takes the path of a JSON file as its argument.
        spec: Content of the JSON file.
        work: Working directory of the script, which also gets the JSON file.
        threads: CPU threads of each process.
        ranks: Additional environment variables, one mapping per process.
        limit_seconds: Time after which the processes are killed.

    Raises:
        PeerError: A process failed, took too long, or printed no JSON object.
    """
    path = work / "spec.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    # -E and -s hide our PYTHON* variables and user site-packages from the peer
    isolation = [] if peer.version is None else ["-E", "-s"]
    command = [str(python), *isolation, str(script), str(path)]
    deadline = time.monotonic() + limit_seconds
    with ExitStack() as opened:

        def output(name: str) -> IO[bytes]:
            return opened.enter_context((work / name).open("w+b"))

        children = []
        for number, own in enumerate(ranks):
            out, errors = output(f"out-{number}"), output(f"errors-{number}")
            environment = _environment(threads) | dict(own)
            child = subprocess.Popen(command, stdout=out, stderr=errors, env=environment, cwd=work)
            opened.callback(_end, child)
            children.append((child, out, errors))
        for child, _, errors in children:
            try:
                child.wait(deadline - time.monotonic())
            except subprocess.TimeoutExpired as error:
                raise PeerError(f"still running after {limit_seconds:g} seconds") from error
            if child.returncode < 0:
                signal = -child.returncode
                raise PeerError(f"killed by signal {signal}; 9 often means out of memory")
            if child.returncode:
                raise PeerError(_last_line_of(errors))
        answer = _last_line_of(children[0][1])
    try:
        result = json.loads(answer)
    except ValueError:
        result = None
    if not isinstance(result, dict):
        raise PeerError(f"last line is not a JSON result: {answer}")
    return result


def _last_line_of(file: IO[bytes]) -> str:
    file.seek(0)
    return last_line(file.read().decode(errors="replace"))


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()


def _environment(threads: int) -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_PACKAGES), os.environ.get("PYTHONPATH")])),
    }
