"""All code for GPUs runs on a fake device, without mixing devices and with few waits for the
device.
"""

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.checkpoint.state import TrainingState
from dist_sae.config import load_run
from dist_sae.dictionaries import build_sae
from dist_sae.dictionaries.axis import WHOLE
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.dead import DeadLatents
from dist_sae.dictionaries.density import DensityCounter
from dist_sae.dictionaries.ema import WeightAverage
from dist_sae.dictionaries.init import initialise_from_data
from dist_sae.dictionaries.interface import Output
from dist_sae.dictionaries.penalised import Penalised
from dist_sae.distributed.engine import Engine
from dist_sae.distributed.mesh import Mesh
from dist_sae.evaluation.evaluate import evaluate
from dist_sae.index.context import open_index
from dist_sae.index.encode import open_encoder
from dist_sae.kernels import device_select, select
from dist_sae.kernels.torch import KERNELS
from dist_sae.storage import open_store
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.training.job import training_step
from dist_sae.training.numbers import batch_numbers, expert_numbers, prefix_fvus, starved_share
from tests.dictionaries.recipes import (
    D_IN,
    N_LATENTS,
    VARIANCE,
    VARIANTS,
    sae_rows,
    some_dead,
    widths,
)
from tests.fake_device import DEVICE, fake_device
from tests.index.indexed import RECIPES, add_checkpoint, produced
from tests.runs import write_run

BATCH = 96
KINDS = VARIANTS | {"routed by batch": VARIANTS["routed"].model_copy(update={"selection": "batch"})}
DEAD_AFTER = 10_000
CPU = torch.device("cpu")
BUDGET = {
    "topk": (1, 1),
    "batchtopk": (2, 2),
    "matryoshka": (3, 3),
    "routed": (2, 2),
    "routed by batch": (3, 3),
    "transcoder": (1, 1),
    "crosscoder": (2, 2),
    "crosscoder_relu": (2, 2),
    "jumprelu": (2, 2),
    "jumprelu_tanh": (2, 2),
    "relu": (2, 2),
    "gated": (2, 2),
    "clt": (3, 3),
    "clt_jumprelu": (3, 3),
    "multi-topk": (1, 1),
}
"""How often a step waits for the device, without dead latents and with some."""


@pytest.fixture(autouse=True)
def many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split products into blocks of 16 latents and 32 rows."""
    monkeypatch.setattr(select, "CHUNK_LATENTS", 16)
    monkeypatch.setattr(select, "CHUNK_BYTES", 16 * 32 * 4)


class Life:
    """A dictionary that is trained on a device."""

    def __init__(self, folder: Path, kind: str, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        run = load_run(write_run(folder / device.type))
        self.device = device
        self.rows = sae_rows(torch.randn(BATCH, D_IN, generator=generator).to(device))
        self.sae: Dictionary = build_sae(
            KINDS[kind],  # type: ignore[arg-type]
            widths(KINDS[kind]),
            product_dtype=torch.bfloat16,
        ).to(device)
        self.engine = Engine(run, self.sae)
        self.dead = DeadLatents(N_LATENTS, DEAD_AFTER, device=device, layers=self.sae.layers)
        self.average = WeightAverage(self.sae, decay=0.9)

    def begin(self) -> None:
        self.sae.initialise(self.rows, seed=0)
        if self.sae.config.init_rows:
            initialise_from_data(self.sae, [self.rows])

    def idle(self, which: Tensor) -> None:
        """Mark these latents as idle for long, and the others as not idle."""
        self.dead.set_idle_rows((which * DEAD_AFTER).to(self.device))

    def step(self) -> tuple[Output, float]:
        output, gradient_norm, _ = training_step(
            self.rows,
            self.engine,
            self.dead,
            self.average,
            batch_rows=BATCH,
            variance=VARIANCE,
            progress=0.5,
            lr=1e-3,
            end_phase=lambda _: None,
        )
        return output, gradient_norm

    @property
    def state(self) -> TrainingState:
        return TrainingState(self.sae, self.engine, self.dead, self.average)

    def numbers(self, output: Output) -> list[Any]:
        """Return the numbers that the reporter and an evaluation compute."""
        sae, x = self.sae, self.rows.targets
        densities = DensityCounter(N_LATENTS, 1000, device=self.device)
        densities.add(output.firings, BATCH)
        second_moment = self.engine.moment(sae.W_enc, "exp_avg_sq")
        found: list[Any] = [
            batch_numbers(WHOLE, output, x, torch.zeros(D_IN, dtype=torch.float64).to(x.device)),
            starved_share(WHOLE, second_moment, 1e-8),
            densities.counts([-4.0, -3.0, -2.0], 1e-2),
        ]
        if output.routing:
            found.append(expert_numbers(WHOLE, output.routing.load, self.dead.mask))
        if output.prefix_fvu:
            found.append(prefix_fvus(WHOLE, output, range(len(output.prefix_fvu))))
        return found

    def tensors(self) -> dict[str, Tensor]:
        pieces = {piece.name: piece.rows.to("cpu", copy=True) for piece in self.state.pieces()}
        inferred = self.sae.infer(self.rows.inputs)
        return pieces | {"x_hat": inferred.x_hat.cpu(), "firings": inferred.firings.cpu()}


def lived(folder: Path, kind: str, device: torch.device) -> tuple[list[Any], dict[str, Tensor]]:
    """Train with dead and revived latents and a restart, and return the numbers and tensors."""
    life, stuck = Life(folder, kind, device), torch.arange(N_LATENTS) % 16 == 1
    life.begin()
    life.step()
    life.idle(some_dead())
    output, _ = life.step()
    numbers = life.numbers(output)
    life.engine.revive(stuck.to(device), life.rows.inputs, output.error)
    checkpoints = Checkpoints(open_store(str(folder / device.type)), kind, keep=1)
    pieces = [piece._replace(rows=piece.rows.cpu()) for piece in life.state.pieces()]
    checkpoints.commit(2, [checkpoints.write(2, iter(pieces))], {})
    resumed = Life(folder, kind, device)
    resumed.state.read(checkpoints.open(2))()
    resumed.step()
    resumed.sae.decode(resumed.sae.encode(life.rows.inputs), life.rows.inputs)
    return numbers, resumed.tensors()


@pytest.mark.parametrize("kind", KINDS)
def test_a_life_on_the_device_is_that_on_a_cpu(tmp_path: Path, kind: str) -> None:
    """No operation mixes devices. The fake device computes on the CPU, so results are the same."""
    with fake_device():
        numbers, tensors = lived(tmp_path, kind, DEVICE)
    expected, there = lived(tmp_path, kind, CPU)
    assert numbers == expected
    for name, tensor in there.items():
        assert torch.equal(tensors[name], tensor), name


def test_what_does_not_fit_is_selected_with_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_select, "largest", lambda *_: None)
    with fake_device():
        _, tensors = lived(tmp_path, "batchtopk", DEVICE)
    for name, tensor in lived(tmp_path, "batchtopk", CPU)[1].items():
        assert torch.equal(tensors[name], tensor), name


def waits_of_a_step(folder: Path, kind: str, dead: Tensor) -> Counter[str]:
    """Count the waits of a step that keeps few entries, as steps of trained dictionaries do."""
    with fake_device() as waits:
        life = Life(folder, kind, DEVICE)
        life.begin()
        if isinstance(life.sae, Penalised):
            life.sae.make_active(slice(None), life.rows.inputs, 1 / BATCH)
            life.sae.b_enc.data -= getattr(life.sae.config, "bandwidth", None) or 0.0
        life.step()
        life.idle(dead)
        # read here, as an earlier step would have read it
        assert life.dead.count == int(dead.sum())
        waits.clear()
        life.step()
        return Counter(waits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_waits_for_the_device_as_often_as_its_budget_says(tmp_path: Path, kind: str) -> None:
    none = torch.zeros(N_LATENTS, dtype=torch.bool)
    for dead, budget in zip((none, some_dead()), BUDGET[kind], strict=True):
        waits = waits_of_a_step(tmp_path, kind, dead)
        assert waits.total() == budget, waits


def sparser_steps(
    folder: Path, kind: str, device: torch.device, waits: Counter[str]
) -> tuple[list[int], list[int | None], dict[str, Tensor]]:
    """Run steps with many entries, with few, with few again, and with very many in one block."""
    life, found, n_entries = Life(folder, kind, device), list[int](), list[int | None]()
    life.begin()
    life.step()
    # entries are kept down to theta - bandwidth / 2
    sae, margin = life.sae, getattr(life.sae, "bandwidth", 0.0) / 2
    assert isinstance(sae, Penalised)
    every, one_chunk = slice(None), slice(16)
    sae.n_entries = None
    for latents, rows in ((every, BATCH / 2), (every, 1), (every, 1), (one_chunk, 8)):
        sae.make_active(latents, life.rows.inputs, rows / BATCH)
        sae.b_enc.data[latents] -= margin
        waits.clear()
        life.step()
        found.append(waits.total())
        n_entries.append(sae.n_entries)
    return found, n_entries, life.tensors()


@pytest.mark.parametrize("kind", ["relu", "gated", "jumprelu", "crosscoder_relu", "clt_jumprelu"])
def test_dense_and_first_steps_wait_a_little_more_often(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These steps keep the same entries as on a CPU.

    So do steps in which a block has too little room.
    """
    monkeypatch.setattr(device_select, "MIN_ROOM", 0)
    with fake_device() as waits:
        found, n_entries, tensors = sparser_steps(tmp_path, kind, DEVICE, waits)
    steady = BUDGET[kind][0]
    assert found == [2, steady + 1, steady, steady]
    _, expected, there = sparser_steps(tmp_path, kind, CPU, Counter())
    assert n_entries == expected
    assert n_entries[0] is None
    assert n_entries[1]
    for name, tensor in there.items():
        assert torch.equal(tensors[name], tensor), name


def test_tensors_on_two_devices_fail_and_waits_are_counted() -> None:
    with fake_device() as waits:
        there, here = torch.ones(3, device=DEVICE), torch.ones(3)
        with pytest.raises(RuntimeError, match="add: tensors on two devices"):
            there + here
        with pytest.raises(RuntimeError, match="cat: tensors on two devices"):
            torch.cat([there, here])
        assert not waits
        assert float((there + torch.tensor(1.0)).sum()) == 6  # a scalar may be on another device
        there[there > 0] = 0.0
        assert there[there == 0].tolist() == [0, 0, 0]
        there.copy_(here, non_blocking=True)
        assert torch.equal(there.cpu(), here)
    assert [w.split()[1:] for w in waits] == [
        ["_local_scalar_dense"],
        ["index", "by", "a", "mask"],
        ["tolist"],
        ["copy", "from", "the", "device"],
    ]
    assert waits.total() == 4
    assert all(w.startswith("test_on_device.py:") for w in waits)


@pytest.mark.parametrize("kind", RECIPES)
def test_evaluation_and_index_are_those_on_a_cpu(tmp_path: Path, kind: str) -> None:
    run = produced(tmp_path, kind)
    add_checkpoint(run)
    expected = evaluate(run)
    Path(run.store.runs, run.name, "evaluation.json").unlink()
    stopping, telemetry = threading.Event(), Telemetry(run.name, "index", None)
    opened = open_index(run, "w", stopping, telemetry, None)
    with fake_device() as waits:
        found = evaluate(run, mesh=Mesh(0, 1, DEVICE, WHOLE))
        assert waits  # the fake device was used
        with open_encoder(opened, WHOLE, DEVICE, stopping) as encoder:
            encoded = encoder.encode(0)
    for name in ("fvu", "l0", "density_counts", "duplicate_share"):
        assert found[name] == expected[name], name
    with open_encoder(opened, WHOLE, CPU, stopping) as encoder:
        encoder.sae.kernels = KERNELS  # the kernels that the device used
        wanted = encoder.encode(0)
    assert encoded.sums == wanted.sums
    for part in ("latents", "rows", "acts"):
        assert (getattr(encoded, part) == getattr(wanted, part)).all(), part
