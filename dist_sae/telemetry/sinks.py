"""Sinks for a run's records: its history and, on request, TensorBoard and Weights & Biases."""

import logging
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import yaml

from dist_sae.config import Run, dump_run
from dist_sae.errors import ConfigError
from dist_sae.storage import ObjectStore
from dist_sae.telemetry.history import History

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]
"""Numbers by name, or by name and label. One of them is `step`."""


class Sink(Protocol):
    """Receives the records since one start of a run, in the order of their steps."""

    def append(self, record: Record) -> None:
        """Add a record."""
        ...

    def flush(self) -> None:
        """Make all records so far durable."""
        ...

    def close(self) -> None:
        """Close the sink; no more records follow."""
        ...


def open_sinks(run: Run, runs: ObjectStore, first_step: int) -> list[Sink]:
    """Open the history, and the other sinks that the run file enables.

    Args:
        run: The run.
        runs: The store of runs.
        first_step: Step at which the curves continue. Earlier records of later steps are dropped.

    Raises:
        ConfigError: A package is missing, or Weights & Biases refuses the run.
    """
    sinks: list[Sink] = [History(runs, run.name, first_step)]
    if run.telemetry.tensorboard is not None:
        folder = Path(run.telemetry.tensorboard).expanduser() / run.name
        sinks.append(OptionalSink("tensorboard", TensorBoard(folder, first_step)))
    if run.telemetry.wandb is not None:
        sinks.append(OptionalSink("wandb", WeightsAndBiases(run, run.telemetry.wandb)))
    return sinks


class OptionalSink:
    """An optional sink: after its first failure it is dropped with a warning."""

    def __init__(self, name: str, sink: Sink) -> None:
        self._name = name
        self._sink: Sink | None = sink

    def append(self, record: Record) -> None:
        self._try(lambda sink: sink.append(record))

    def flush(self) -> None:
        self._try(lambda sink: sink.flush())

    def close(self) -> None:
        self._try(lambda sink: sink.close())

    def _try(self, call: Callable[[Sink], None]) -> None:
        if self._sink is None:
            return
        try:
            call(self._sink)
        except Exception as exc:  # dozens of types: a full disk, an unreachable service
            self._sink = None
            logger.warning(
                "telemetry.%s failed, and this process sends it no more records: %s",
                self._name,
                exc,
            )


class TensorBoard:
    """TensorBoard event files in a folder of this machine."""

    def __init__(self, folder: Path, first_step: int) -> None:
        _require("tensorboard")
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def append(self, record: Record) -> None:
        for name, value in _flat(record):
            self._writer.add_scalar(name, value, record["step"])

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A Weights & Biases run with the run's name. WANDB_* set the account and the server."""

    def __init__(self, run: Run, project: str) -> None:
        _require("wandb")
        import wandb

        try:
            self._run = wandb.init(
                project=project,
                id=run.name,
                resume="allow",
                config=yaml.safe_load(dump_run(run)),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.Error as exc:
            raise ConfigError(f"telemetry.wandb: {project} cannot be opened: {exc}") from exc

    def append(self, record: Record) -> None:
        self._run.log(dict(_flat(record)), step=record["step"])

    def flush(self) -> None:
        pass  # wandb stores records in its own file

    def close(self) -> None:
        self._run.finish()


def _require(package: str) -> None:
    if find_spec(package) is None:
        raise ConfigError(
            f"telemetry.{package}: the package is missing; run pip install '.[{package}]' in the "
            f"repository"
        )


def _flat(record: Record) -> Iterator[tuple[str, float]]:
    """Flatten a record to names such as `phases/wait`, which both services group by prefix."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{label}", number) for label, number in value.items())
        elif name != "step":
            yield name, value
