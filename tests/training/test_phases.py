"""Time per phase, measured by the device's clock."""

import time
import weakref
from typing import Any, ClassVar

import pytest
import torch

from dist_sae.config.sae import RoutedConfig, TopKConfig
from dist_sae.dictionaries import build_sae
from dist_sae.distributed import axis
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.training import phases
from dist_sae.training.clock import Times
from dist_sae.training.phases import Clock, Phases, ProductSamples
from tests.telemetry.scrape import values

CPU = torch.device("cpu")
JOB = "world"


class Event:
    """An event like torch.cuda's, which happens when the device reaches it.

    The device's time is `now`.
    """

    now = 0.0
    waits = 0
    alive: ClassVar[weakref.WeakSet["Event"]] = weakref.WeakSet()

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.at: float | None = None
        Event.alive.add(self)

    def record(self) -> None:
        Event.now += 1.0
        self.at = Event.now

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        Event.waits += 1

    def elapsed_time(self, end: "Event") -> float:
        assert self.at is not None
        assert end.at is not None
        return 1e3 * (end.at - self.at)


def test_phases_add_up_to_the_time_that_passed() -> None:
    since = time.perf_counter()
    watch = Phases(Clock(CPU), JOB)
    for _ in range(3):
        for phase in ("wait", "forward"):
            sum(range(10_000))
            watch.end(phase)
    spent = watch.take(JOB)
    assert spent.keys() == {"wait", "forward"}
    assert min(spent.values()) > 0
    assert sum(spent.values()) <= time.perf_counter() - since
    assert watch.take(JOB) == {}


def test_a_gpu_is_waited_for_only_when_its_times_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "waits", 0)
    Event.alive.clear()
    watch = Phases(Clock(torch.device("cuda")), JOB)
    for _ in range(1000):
        watch.end("forward")
        watch.end("rest")
    assert Event.waits == 0
    assert len(Event.alive) <= phases.MAX_MARKS + 1  # past events are dropped
    assert watch.take(JOB) == {"forward": 1000.0, "rest": 1000.0}
    assert Event.waits == 1


def test_a_phase_gives_up_what_other_phases_took_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks are a second apart. No phase gives up more time than it has."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Phases(Clock(torch.device("cuda")), JOB)
    watch.end("forward", within={"wait": -1.0, "ranks": 0.25})
    watch.end("ranks", within={"wait": 0.75, "save": 3.0})
    assert watch.take(JOB) == {"wait": 0.75, "ranks": 0.25, "forward": 0.75, "save": 0.25}


def test_a_phase_of_one_job_is_time_in_others_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks are a second apart.

    All jobs wait, then each makes a step, and each job's phases add up to the total time.
    """
    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Phases(Clock(torch.device("cuda")), "a", "b")
    watch.end("wait")
    watch.end("forward", "a", {"ranks": 0.25})
    watch.end("optimiser", "a")
    watch.end("forward", "b")
    assert watch.take("a") == {
        "wait": 1.0,
        "ranks": 0.25,
        "forward": 0.75,
        "optimiser": 1.0,
        "others": 1.0,
    }
    watch.end("wait")
    assert watch.take("b") == {"wait": 2.0, "others": 2.0, "forward": 1.0}


def test_time_in_collectives_is_that_of_the_devices_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The host's clock cannot tell, because the host only launches collectives.

    Marks are a second apart.
    """
    monkeypatch.setattr(torch.cuda, "Event", Event)
    spent = {}
    for device in ("cuda", "cpu"):
        times = Times(torch.device(device), {JOB: Telemetry(JOB, "train", None)})
        monkeypatch.setattr(axis, "seconds", axis.seconds + 1e9)
        for _ in range(2):
            with axis.collective():
                pass
        times.end("forward")
        times.end("rest")  # a phase without collectives
        spent[device] = times.take(JOB)
    assert spent["cuda"] == {"wait": 0.0, "ranks": 2.0, "forward": 3.0, "rest": 1.0}
    assert spent["cpu"]["ranks"] > 0


def test_waiting_is_counted_while_it_lasts() -> None:
    """Each wait counts once: two units for the normalizer (5 s, 4 s), a batch (3 s), and a batch
    that is already loaded.
    """
    telemetry = Telemetry(JOB, "train", None)
    times = Times(CPU, {JOB: telemetry})
    counted = []

    def wait(*seconds: float) -> None:
        for so_far in seconds:
            times.report_wait(so_far)
        page = values(telemetry.render().decode())
        counted.append(page["dist_sae_train_wait_seconds_total",])

    wait(2.0, 5.0)
    wait(2.0, 4.0)
    times.end("begin")
    wait(2.0)
    for waited in (3.0, 0.0):
        times.count_wait(waited)
        times.end("wait")
    wait()
    assert counted == [5.0, 9.0, 11.0, 12.0]


def test_the_product_is_scaled_up_from_its_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample is 128 rows x 1,024 latents: of 32,768, or of the 4,096 that a row meets."""
    seconds = iter([0.25, 0.5, 1.0])
    monkeypatch.setattr(Clock, "seconds", lambda *_: next(seconds))
    monkeypatch.setattr(phases, "MAX_SAMPLE_SHARE", 1e9)
    x = torch.randn(128, 4)
    topk = ProductSamples(build_sae(TopKConfig(n_latents=32_768, k=4, auxk=4), 4), Clock(CPU))
    topk.cap(3.0)
    assert topk.seconds is None
    topk.sample(x)
    assert topk.seconds == 0.25 * 32
    topk.sample(x)  # the fastest sample counts
    assert topk.seconds == 0.25 * 32
    topk.cap(0.25 * 40)
    assert topk.seconds == 0.25 * 32
    topk.cap(3.0)  # the time of a forward pass, which includes the product
    assert topk.seconds == 3.0
    config = RoutedConfig(n_latents=32_768, k=4, auxk=4, experts=16, experts_per_row=2)
    routed = ProductSamples(build_sae(config, 4), Clock(CPU))
    routed.sample(x)
    assert routed.seconds == 1.0 * 32 / 8


def test_samples_of_the_product_take_a_bounded_share_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[Any] = []

    def seconds(*marks: Any) -> float:
        taken.append(marks)
        return 0.05

    monkeypatch.setattr(Clock, "seconds", seconds)
    samples = ProductSamples(build_sae(TopKConfig(n_latents=64, k=4, auxk=4), 4), Clock(CPU))
    for _ in range(5):  # the first one took .1 s, which is 0.2 % of 50 s
        samples.sample(torch.randn(8, 4))
    assert len(taken) == 1
