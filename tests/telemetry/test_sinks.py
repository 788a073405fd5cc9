"""The training curves, as TensorBoard and Weights & Biases read them."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from dist_sae.config import Run, load_run
from dist_sae.errors import ConfigError
from dist_sae.storage import open_store
from dist_sae.telemetry.sinks import OptionalSink, open_sinks
from tests.runs import TINY, write_run


def life(run: Run, tmp_path: Path, first_step: int, records: list[dict[str, Any]]) -> None:
    """Simulate one process of a run, which starts at `first_step` and appends these records."""
    sinks = open_sinks(run, open_store(str(tmp_path / "runs")), first_step)
    for sink in sinks:
        for record in records:
            sink.append(record)
        sink.flush()
        sink.close()


PHASES = {"wait": 0.25, "forward": 1.5}
LIVES = {
    0: [{"step": s, "fvu": s / 4, "phases": PHASES} for s in (10, 20, 30)],
    20: [{"step": s, "fvu": s / 2, "phases": PHASES} for s in (30, 40)],
}
"""Records by first step: the first process dies after step 30, and the second resumes from step 20.
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from tensorboard's dependencies
def test_tensorboard_shows_one_curve_of_a_resumed_run(tmp_path: Path) -> None:
    folder = tmp_path / "tensorboard"
    run = load_run(write_run(tmp_path, TINY, telemetry={"tensorboard": str(folder)}))
    for first_step, records in LIVES.items():
        life(run, tmp_path, first_step, records)
    events = EventAccumulator(str(folder / "tiny"))
    events.Reload()
    fvu = [(event.step, event.value) for event in events.Scalars("fvu")]
    assert fvu == [(10, 2.5), (20, 5.0), (30, 15.0), (40, 20.0)]
    assert {event.value for event in events.Scalars("phases/wait")} == {0.25}


def test_wandb_gets_the_curve_under_the_runs_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = load_run(write_run(tmp_path, TINY, telemetry={"wandb": "a-project"}))
    curves = []
    for first_step, records in LIVES.items():
        # wandb cannot distinguish processes that start in the same second
        folder = tmp_path / str(first_step)
        folder.mkdir()
        monkeypatch.setenv("WANDB_DIR", str(folder))
        life(run, tmp_path, first_step, records)
        wandb.teardown()  # as at the end of a process, when all is written
        (path,) = folder.glob("wandb/offline-run-*/run-tiny.wandb")
        curves.append(list(steps_of(path)))
    assert curves == [
        [(10, 2.5, 0.25), (20, 5.0, 0.25), (30, 7.5, 0.25)],
        [(30, 15.0, 0.25), (40, 20.0, 0.25)],
    ]


def steps_of(path: Path) -> Iterator[tuple[int, float, float]]:
    """Yield (step, fvu, phases/wait) for each record that wandb would send to its server."""
    messages: Any = wandb_internal_pb2
    for data in logged(path.read_bytes()):
        record = messages.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {
                item.key or "/".join(item.nested_key): float(item.value_json)
                for item in record.history.item
                if not (item.key or item.nested_key[0]).startswith("_")
            }
            yield record.history.step.num, items["fvu"], items["phases/wait"]


def logged(file: bytes) -> Iterator[bytes]:
    """Yield the records of a LevelDB log that begins with a header of seven bytes."""
    whole, at = b"", 7
    while at + 7 <= len(file):
        if (rest := 32_768 - at % 32_768) < 7:  # no space for a header: go to the next block
            at += rest
        _, length, kind = struct.unpack_from("<IHB", file, at)
        whole += file[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            yield whole
            whole = b""


def test_a_run_goes_on_without_a_sink_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    class Full:
        appended = 0

        def append(self, _: object) -> None:
            self.appended += 1

        def flush(self) -> None:
            raise OSError("no space left")

        def close(self) -> None:
            raise AssertionError("it is not asked any more")

    inner = Full()
    sink = OptionalSink("tensorboard", inner)
    sink.append({"step": 1})
    sink.flush()
    sink.append({"step": 2})
    sink.flush()
    sink.close()
    assert inner.appended == 1
    said = "telemetry.tensorboard failed, and this process sends it no more records: no space left"
    assert caplog.messages == [said]


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    run = load_run(write_run(tmp_path, TINY, telemetry={package: "somewhere"}))
    monkeypatch.setattr("dist_sae.telemetry.sinks.find_spec", lambda _: None)
    with pytest.raises(ConfigError) as caught:
        open_sinks(run, open_store(str(tmp_path / "runs")), 0)
    assert str(caught.value) == (
        f"telemetry.{package}: the package is missing; run pip install '.[{package}]' in the "
        f"repository"
    )
