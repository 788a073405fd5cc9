"""The memory of a dictionary is computed, and refused if too large, before any is allocated."""

import logging
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from dist_sae.config import Run, load_run
from dist_sae.config.sae import SaeConfig
from dist_sae.data.work_queue import Worker
from dist_sae.dictionaries.axis import LatentAxis
from dist_sae.dictionaries.interface import Widths
from dist_sae.distributed.mesh import SINGLE_PROCESS
from dist_sae.distributed.rendezvous import Ranks
from dist_sae.distributed.watch import Watch
from dist_sae.errors import ConfigError
from dist_sae.producing.loop import produce
from dist_sae.producing.planner import plan
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.training.loop import train
from dist_sae.training.memory import check_memory, state_bytes
from tests.dictionaries.recipes import LAYERS
from tests.runs import TINY, write_run

TWO, FOUR = Widths((3, 5), (3, 5)), Widths((4,) * 4, (4,) * 4)


def run_of(folder: Path, *settings: str, **sae: Any) -> Run:
    """Make a run whose recipe may name sites that the run does not have."""
    config: SaeConfig = TypeAdapter(SaeConfig).validate_python(sae)
    return load_run(write_run(folder), list(settings)).model_copy(update={"sae": config})


def test_every_site_is_counted(tmp_path: Path) -> None:
    """The count includes fp32 weights, gradients, two moments, a running mean if there is one, and
    a bf16 W_enc.

    A crosscoder of widths 3 and 5 has 8 latents x (8 + 8 + a bias), and 8 values of b_dec. A CLT of
    four layers of width 4 has 8 latents x (4 + 4 x (4 + 3 + 2 + 1) / 4 + a bias), and 16 values of
    b_dec.
    """
    crosscoder = run_of(tmp_path, kind="crosscoder", n_latents=8, k=2, reads=LAYERS[:2])
    assert sum(state_bytes(crosscoder, TWO)) == 4 * 4 * (8 * 17 + 8)
    clt = run_of(tmp_path, kind="clt", n_latents=8, k=2, reads=LAYERS)
    assert sum(state_bytes(clt, FOUR)) == 4 * 4 * (8 * 15 + 16)
    averaged = run_of(tmp_path, "train.ema_decay=0.9", kind="relu", n_latents=8)
    assert sum(state_bytes(averaged, Widths.of(6))) == 4 * 5 * (8 * 13 + 6)
    rounded = run_of(tmp_path, "train.products=bf16", kind="relu", n_latents=8)
    assert sum(state_bytes(rounded, Widths.of(6))) == 4 * 4 * (8 * 13 + 6) + 2 * 8 * 6
    half = LatentAxis(shards=2, replicas=3)
    assert sum(state_bytes(clt, FOUR, half)) == 4 * 4 * (4 * 15 + 16)
    for stage, copies in ((1, 1 + 1 + 2 / 3), (2, 1 + 1)):
        zero = f"train.deepspeed={{zero_optimization: {{stage: {stage}}}}}"
        parted = run_of(tmp_path, zero, kind="clt", n_latents=8, k=2, reads=LAYERS)
        assert sum(state_bytes(parted, FOUR, half)) == pytest.approx(
            4 * copies * (4 * 15 + 16), abs=1
        )
    elsewhere = "train.deepspeed={zero_optimization: {offload_optimizer: {device: cpu}, stage: 1}}"
    offloaded = run_of(tmp_path, elsewhere, kind="clt", n_latents=8, k=2, reads=LAYERS)
    assert sum(state_bytes(offloaded, FOUR)) == 4 * 2 * (8 * 15 + 16)


def test_what_no_machine_holds_is_refused_before_it_is_built(tmp_path: Path) -> None:
    """10^12 latents take 288 TB: 17 values each, four times in fp32, and 8 values each in bf16."""
    run = load_run(write_run(tmp_path, TINY), ["sae.n_latents=1000000000000", "sae.init=random"])
    plan(run)
    stopping, telemetry = threading.Event(), Telemetry(run.name, "train", None)
    produce(run, Worker("p"), stopping, Telemetry(run.name, "produce", None))
    watch = Watch(Ranks(0, 1, 0, ("here",)), stopping, lost_seconds=60, hung_seconds=60)
    with pytest.raises(ConfigError) as raised:
        train(run, SINGLE_PROCESS, watch, stopping, telemetry)
    assert re.fullmatch(
        r"sae\.n_latents: 1,000,000,000,000 latents that read 8 and write 8 numbers take "
        r"288,000\.0 GB on .* with gradients and Adam's moments, but it has only [\d,.]+ GB; "
        r"use fewer .*",
        str(raised.value),
    )


def test_what_a_run_takes_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        job = run_of(tmp_path, kind="relu", n_latents=1000), Widths.of(16), SINGLE_PROCESS
        check_memory([job], SINGLE_PROCESS)
        check_memory([job, job], SINGLE_PROCESS)
    alone, both = caplog.messages[-2:]
    assert re.fullmatch(r"the dictionary takes 0\.000528 of \S+ GB on .*", alone)
    assert re.fullmatch(r"2 dictionaries take 0\.00106 of \S+ GB on .*", both)
