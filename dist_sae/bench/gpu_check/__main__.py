"""Command that runs the stages, each in a process with a time limit, and prints a summary.

python -m dist_sae.bench.gpu_check [--device cpu] [--only STAGE,STAGE]
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

LIMITS_SECONDS = {
    "machine": 60,
    "products": 60,
    "recipes": 120,
    "speed": 120,
    "pipeline": 90,
    "ranks": 90,
}
"""The stages, in order, with their time limits. An H100 should need half of each."""
_DRY_LIMIT_SECONDS = 600
_SHOWN = ("error", "ratio", "speedup", "bytes_per_second", "fvu", "reason")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen stages. Returns 0 if all checks passed, else 1."""
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description="check this project on a GPU")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run")
    parser.add_argument(
        "--only", metavar="STAGES", help=f"comma-separated, from {','.join(LIMITS_SECONDS)}"
    )
    parser.add_argument("--stage", choices=LIMITS_SECONDS, help=argparse.SUPPRESS)
    parser.add_argument("--rank-of", choices=["ranks"], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.stage or options.rank_of:
        _run_here(options)
        return 0
    stages = options.only.split(",") if options.only else list(LIMITS_SECONDS)
    if unknown := [stage for stage in stages if stage not in LIMITS_SECONDS]:
        parser.error(
            f"--only: unknown stage {unknown[0]}; the stages are {','.join(LIMITS_SECONDS)}"
        )
    found: list[dict[str, Any]] = []
    for stage in stages:
        for record in _results(stage, options.device):
            print(json.dumps(record), flush=True)  # noqa: T201 - its output
            found.append(record)
        if stage == "machine" and not found[-1]["ok"]:  # no GPU: all others would fail too
            break
    _print_table(found)
    return 0 if all(record["ok"] for record in found) else 1


def _run_here(options: argparse.Namespace) -> None:
    """Run a stage, or one of its ranks, in this process."""
    import torch

    from dist_sae.bench.gpu_check.stage import StageContext

    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    with tempfile.TemporaryDirectory(prefix="gpu_check.") as folder:
        context = StageContext(device, Path(folder))
        stage = options.stage or options.rank_of
        module = importlib.import_module(f"{__package__}.{stage}")  # the others are slow to import
        if options.rank_of:
            module.run_rank(context)
            return
        for record in getattr(module, stage)(context):
            print(json.dumps(record), flush=True)  # noqa: T201 - read by the parent


def _results(stage: str, device: str) -> Iterator[dict[str, Any]]:
    """Run a stage. Yields its records as they arrive, and one with the reason if it fails."""
    since = time.monotonic()
    limit = LIMITS_SECONDS[stage] if device == "cuda" else _DRY_LIMIT_SECONDS
    command = [sys.executable, "-m", __package__, "--device", device, "--stage", stage]
    late = threading.Event()
    stderr_tail: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:

        def end() -> None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also kills its ranks and programs

        def end_late() -> None:
            late.set()
            end()

        timer = threading.Timer(limit, end_late)
        assert process.stdout is not None
        assert process.stderr is not None
        listener = threading.Thread(target=_copy_stderr, args=(process.stderr, stderr_tail))
        timer.start()
        listener.start()
        try:
            for line in process.stdout:
                if line.startswith("{"):
                    seconds = round(time.monotonic() - since, 1)
                    yield {"stage": stage, **json.loads(line), "after_seconds": seconds}
            code = process.wait()
        finally:
            timer.cancel()
            end()  # processes it left running would keep its pipes open
            listener.join()
    if late.is_set() or code:
        reason = (
            f"took more than {limit} s" if late.is_set() else _failure_reason(stderr_tail, code)
        )
        yield {"stage": stage, "check": "whole stage", "ok": False, "reason": reason}


def _copy_stderr(stderr: IO[str], stderr_tail: list[str]) -> None:
    """Copy a stage's stderr to ours, and keep its last 100 lines in `stderr_tail`."""
    for line in stderr:
        sys.stderr.write(line)
        stderr_tail.append(line.strip())
        del stderr_tail[:-100]


def _failure_reason(stderr_tail: Sequence[str], code: int) -> str:
    return next((line for line in reversed(stderr_tail) if line), f"exit code {code}")


def _print_table(found: Sequence[dict[str, Any]]) -> None:
    """Print a line per check: whether it passed, its stage, name and main numbers."""
    for record in found:
        numbers = [
            f"{name} {_short(record[name])}" for name in _SHOWN if record.get(name) is not None
        ]
        words = "ok    " if record["ok"] else "FAILED"
        print(f"{words}  {record['stage']:9} {record['check']:50} {', '.join(numbers)}")  # noqa: T201
    failed = sum(not record["ok"] for record in found)
    print(f"{len(found)} checks, {failed} failed")  # noqa: T201


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
