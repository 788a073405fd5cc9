"""Protocol of the runners: read a spec, train on batches from one file, print one JSON line.

A runner is executed by path with its peer's own Python, where dist_sae is not installed. So this
file is in the runner's folder, and imports only the standard library, numpy and torch.
"""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

AS_SHIPPED, MATCHED = "as_shipped", "matched"
BF16 = "_bf16"

Trained = tuple[Callable[[Tensor], Tensor], Sequence[str]]
"""A function from rows in the trainer's scale to reconstructions, and notes on the settings."""

BETAS = (0.9, 0.999)
EPS = 6.25e-10
AUXK_COEFFICIENT = 1 / 32
DEAD_AFTER_ROWS = 10_000_000

_SCALE_ROWS = 65_536
_FVU_CHUNK_ROWS = 512  # peers allocate [rows, n_latents] to encode


@dataclass(frozen=True)
class Spec:
    """Settings of one run of a peer, passed as JSON."""

    rows: str
    """File of rows [n, d_in]; for a transcoder [n, 2 d_in], inputs and targets side by side."""
    heldout: str | None
    d_in: int
    n_latents: int
    k: int
    batch: int
    steps: int
    lr: float
    setting: str
    threads: int
    seed: int
    transcoder: bool = False

    @property
    def matched(self) -> bool:
        return self.setting.startswith(MATCHED)

    @property
    def bf16(self) -> bool:
        return self.setting.endswith(BF16)

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Split rows into inputs and targets, which are the same for an autoencoder."""
        return rows[:, : self.d_in], rows[:, -self.d_in :]


class Batches(Iterator[Tensor]):
    """Iterator over the first `spec.steps` batches, which records when each is requested.

    The trainer pulls batches, so the time between two requests is one whole step.

    Args:
        spec: The run.
        scale: Factor for the rows, or one for each column.
    """

    def __init__(self, spec: Spec, scale: Tensor | float = 1.0) -> None:
        self._spec = spec
        self._scale = scale
        self._stamps: list[float] = []

    def __next__(self) -> Tensor:
        number = len(self._stamps)
        if number >= self._spec.steps:
            self.finish()
            raise StopIteration
        self._stamps.append(time.perf_counter())
        return self.read(number)

    def __len__(self) -> int:
        return self._spec.steps

    def read(self, number: int) -> Tensor:
        """Read batch `number` without recording the time."""
        return read_rows(self._spec, number * self._spec.batch, self._spec.batch) * self._scale

    def finish(self) -> None:
        """Record the end of the last step. Later calls do nothing."""
        if len(self._stamps) == self._spec.steps:
            self._stamps.append(time.perf_counter())

    @property
    def seconds_per_step(self) -> list[float]:
        """Seconds of each step."""
        return [b - a for a, b in zip(self._stamps, self._stamps[1:], strict=False)]


def read_spec(arguments: Sequence[str] | None = None) -> Spec:
    """Read the spec at the path in the first argument, and set the threads and the seed."""
    path = (sys.argv if arguments is None else arguments)[1]
    spec = Spec(**json.loads(Path(path).read_text(encoding="utf-8")))
    torch.set_num_threads(spec.threads)
    torch.manual_seed(spec.seed)
    return spec


def read_rows(spec: Spec, first: int, n_rows: int) -> Tensor:
    """Read rows as a new float32 tensor. Unmaps the file, so its pages do not count as memory."""
    mapped = np.load(spec.rows, mmap_mode="r")
    return torch.from_numpy(np.array(mapped[first : first + n_rows], dtype=np.float32))


def common_scale(spec: Spec) -> Tensor:
    """Return column factors that scale rows (or inputs and targets each) to E|x|^2 = d_in."""
    rows = read_rows(spec, 0, min(_SCALE_ROWS, spec.steps * spec.batch))
    squares = rows.square().mean(0, dtype=torch.float64).view(-1, spec.d_in).sum(1, keepdim=True)
    return (spec.d_in / squares).sqrt().float().expand(-1, spec.d_in).flatten()


@torch.no_grad()
def heldout_fvu(
    spec: Spec, reconstruct: Callable[[Tensor], Tensor], scale: Tensor | float = 1.0
) -> float | None:
    """Return sum |y - y_hat|^2 / sum |y - mean|^2 over the held-out targets, in their own units.

    Returns None if the run has no held-out rows.

    Args:
        spec: The run.
        reconstruct: Function from inputs to reconstructed targets, both in the trainer's units.
        scale: Factor from the rows' own units to the trainer's, or one for each column.
    """
    if spec.heldout is None:
        return None
    heldout = np.load(spec.heldout, mmap_mode="r")
    factors = torch.as_tensor(scale).expand(heldout.shape[1])
    mean = torch.from_numpy(np.asarray(heldout[:, -spec.d_in :].mean(0, dtype=np.float64)))
    error = spread = 0.0
    for first in range(0, len(heldout), _FVU_CHUNK_ROWS):
        x = torch.from_numpy(np.array(heldout[first : first + _FVU_CHUNK_ROWS], np.float32))
        inputs, _ = spec.split(x * factors)
        y_hat = reconstruct(inputs).float() / factors[-spec.d_in :]
        y = spec.split(x)[1].double()
        error += float((y - y_hat.double()).square().sum())
        spread += float((y - mean).square().sum())
    return error / spread


def measure(version: str, train: Callable[[Spec, Batches], Trained]) -> int:
    """Train a peer by the spec and print the result as one JSON line, the last of stdout.

    In matched settings, rows (or inputs and targets each) are scaled to E|x|^2 = d_in.

    Args:
        version: The peer's version.
        train: Function that trains the peer on the batches.
    """
    spec = read_spec()
    scale = common_scale(spec) if spec.matched else 1.0
    batches = Batches(spec, scale)
    reconstruct, notes = train(spec, batches)
    batches.finish()
    result = {
        "seconds_per_step": batches.seconds_per_step,
        "rows": len(batches.seconds_per_step) * spec.batch,
        "fvu": heldout_fvu(spec, reconstruct, scale),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT_BYTES,
        "version": version,
        "notes": notes,
    }
    sys.stdout.write("\n" + json.dumps(result) + "\n")
    sys.stdout.flush()
    return 0


def rows_per_second(seconds_per_step: Sequence[float], batch: int, warmup_steps: int) -> float:
    """Return rows per second at the median step time, without the warm-up steps."""
    return batch / statistics.median(seconds_per_step[warmup_steps:])


_RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024
