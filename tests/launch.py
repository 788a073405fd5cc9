"""Runs the real programs as processes, the way `dist-sae run` and a cluster do."""

import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import yaml

from dist_sae.logs import SUPERVISED
from tests.forks import Program

WORLD: dict[str, Any] = {
    "name": "world",
    "model": {"kind": "synthetic", "d_in": 16, "n_features": 48, "l0": 3},
    "corpus": {"kind": "synthetic", "documents": 200, "document_rows": 32},
    "activations": {
        "sites": ["synthetic"],
        "context_tokens": 32,
        "unit_rows": 350,
        "block_rows": 100,
        "streams": 4,
        "window_units": 2,
        "dtype": "fp32",
    },
    "sae": {"kind": "topk", "n_latents": 64, "k": 3, "auxk": 16, "dead_after_rows": 480},
    "train": {
        "rows": 9600,
        "max_passes": 2,
        "batch_rows": 160,
        "lr": 3e-3,
        "products": "fp32",
        "normaliser_rows": 2000,
        "log_every_steps": 1,
        "save_every_steps": 1000,
    },
}


def write_run(folder: Path, **sections: Any) -> Path:
    """A run file of the small world under `folder`, with keys of some sections replaced.

    A section of another kind replaces the whole.
    """
    data = json.loads(json.dumps(WORLD))
    data["store"] = {"activations": str(folder / "activations"), "runs": str(folder / "runs")}
    for section, values in sections.items():
        old = data.get(section, {})
        same = isinstance(values, dict) and values.get("kind", old.get("kind")) == old.get("kind")
        data[section] = {**old, **values} if same else values
    path = folder / "run.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(data))
    return path


def start(*arguments: str, env: dict[str, str] | None = None) -> Program:
    """A `dist-sae` process with one thread, supervised by this one: it stops when this one dies."""
    return Program(arguments, os.environ | {"OMP_NUM_THREADS": "1", SUPERVISED: "1"} | (env or {}))


def run(*arguments: str, env: dict[str, str] | None = None, code: int = 0) -> str:
    """Run to the end; returns stdout, or stderr where a failure is expected."""
    process = start(*arguments, env=env)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err[-3000:]
    return err if code else out


def produce(path: Path, *options: str) -> None:
    """Plan and produce the whole activation set."""
    run("plan", str(path), *options)
    run("produce", str(path), *options)


def train(path: Path, *options: str, world: int = 1, stop_at: int | None = None) -> list[str]:
    """Train with `world` ranks; with `stop_at`, SIGTERM to rank 0 when it reports that step.

    Returns:
        Each rank's stderr.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(world):
        env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        setting = f"processes.trainers={world}"
        ranks.append(start("train", str(path), "--set", setting, *options, env=env))
    if stop_at is not None:
        for line in ranks[0].stdout:
            if line.startswith("{") and json.loads(line)["done"] >= stop_at:
                ranks[0].send_signal(signal.SIGTERM)
                break
    errors = [process.communicate(timeout=300)[1] for process in ranks]
    expected = 0 if stop_at is None else 75
    assert [p.returncode for p in ranks] == [expected] * world, "\n".join(e[-2000:] for e in errors)
    return errors
