"""The pauses before pods are replaced, for the rendered Jobs in simulated time."""

import heapq
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_sae.config import load_run
from dist_sae.errors import LivesSpentError
from dist_sae.storage import ObjectStore, open_store
from dist_sae.storage.lives import PodLife
from tests.kubernetes.controllers import Job
from tests.kubernetes.manifests import Object
from tests.kubernetes.test_render import all_jobs_of

pytestmark = pytest.mark.system

RUN = Path(__file__).parents[2] / "launch/runs/llama3.1-8b-resid16-batchtopk-1m-16xh100.yaml"
HOUR, DAY = 3600.0, 86_400.0


class FakePod:
    """A pod that runs until the test ends it."""

    name = "fake"

    def __init__(self) -> None:
        self.phase = "Running"
        self.exit_codes: dict[str, int] = {}
        self.conditions: set[str] = set()

    def end(self, code: int) -> None:
        self.phase, self.exit_codes = "Failed", {"main": code}

    def terminate(self) -> None:
        self.end(75)


class World:
    """One Job in simulated time, which advances from event to event."""

    def __init__(self, manifest: Object) -> None:
        self.now = 0.0
        self.started: list[float] = []
        self.job = Job(manifest, self._make, lambda: self.now)  # type: ignore[arg-type]
        self.job.reconcile()

    def _make(self, _: Object) -> FakePod:
        self.started.append(self.now)
        return FakePod()

    def end(self, index: int, code: int) -> None:
        if index in self.job.active:
            self.job.active[index].end(code)  # type: ignore[attr-defined]
            self.job.reconcile()

    def pass_to(self, then: float) -> Iterator[float]:
        """Advance to a time, and yield the length of each interval in which nothing changes."""
        while (pause := self.job.next_start) is not None and pause <= then:
            yield pause - self.now
            self.now = pause
            self.job.reconcile()
        yield then - self.now
        self.now = then


def rendered(part: str, *overrides: str) -> Object:
    """Return a part's Job with empty pods, because the simulation copies each pod."""
    jobs = all_jobs_of(load_run(RUN, overrides))
    job = next(job for job in jobs if f"-{part}-" in job["metadata"]["name"])
    pod = {"restartPolicy": "Never", "containers": []}
    return job | {"spec": job["spec"] | {"template": {"metadata": {"labels": {}}, "spec": pod}}}


def of_the_whole_job(job: Object) -> Object:
    """Return this Job with one failure budget for all of its pods."""
    limits = ("backoffLimitPerIndex", "maxFailedIndexes")
    spec = {key: value for key, value in job["spec"].items() if key not in limits}
    return job | {"spec": spec | {"backoffLimit": 6}}


def pause_after_lost_ranks(job: Object, losses: int) -> list[float]:
    """Return the seconds without trainers after each lost rank, which ends all pods with 75."""
    world = World(job)
    pauses = []
    for loss in range(1, losses + 1):
        for _ in world.pass_to(loss * DAY):
            pass
        for index in range(16):
            world.end(index, 75)
        assert not world.job.active
        for _ in world.pass_to(world.now + HOUR):
            pass
        assert len(world.job.active) == 16
        pauses.append(max(world.started) - loss * DAY)
    return pauses


def live_share(job: Object, *, days: int) -> float:
    """Return the share of 1,000 producers that are live on the last day, if each is preempted once
    a day.
    """
    random.seed(0)
    world, live, whole = World(job), 0.0, 0.0
    events = [(random.random() * DAY, index) for index in range(1000)]
    heapq.heapify(events)
    while events[0][0] < days * DAY:
        then, index = events[0]
        heapq.heapreplace(events, (then + random.uniform(0.5, 1.5) * DAY, index))
        for seconds in world.pass_to(then):
            if world.now > (days - 1) * DAY:
                live += seconds * len(world.job.active)
                whole += seconds * 1000
        world.end(index, 75)
    return live / whole


def test_pods_that_lose_one_of_them_come_back_soon() -> None:
    job = rendered("trainer", "processes.trainers=128", "activations.streams=128")
    assert job["spec"]["completions"] == 16
    assert pause_after_lost_ranks(job, 8) == [10, 20, 40, 80, 160, 320, 600, 600]
    assert pause_after_lost_ranks(of_the_whole_job(job), 1) == [600]


def test_a_thousand_preempted_producers_stay_live() -> None:
    job = rendered("producer", "processes.producers=1000")
    assert live_share(job, days=8) > 0.99  # with the longest pause, 10 min a day, the share is .993
    assert live_share(of_the_whole_job(job), days=2) < 0.7


def live(world: World, store: ObjectStore, code: int, *, progress: bool) -> None:
    """Run all 16 trainers once, count their lives, and end them all with this code."""
    for index in range(16):
        life = PodLife(store, "run", "trainer", index, job=world.job.uid, retries=6)
        try:
            life.begin()
        except LivesSpentError as error:
            world.end(index, error.exit_code)
            continue
        if progress:
            life.progressed()
        world.end(index, code)
    for _ in world.pass_to(world.now + HOUR):
        pass
    world.job.reconcile()


def test_progress_refills_the_retries_and_lives_without_any_end_the_run(tmp_path: Path) -> None:
    """Running out of memory, an NCCL abort, a bug and a lost rank each restart the pods without
    limit, as long as the run makes progress.
    """
    store = open_store(str(tmp_path))
    world = World(rendered("trainer", "processes.trainers=128", "activations.streams=128"))
    for code in 10 * (137, 134, 70, 75):
        live(world, store, code, progress=True)
        assert world.job.condition is None
    assert not world.job.counted
    for code in (75, 75, 75, 75, 137, 75, 75):  # the first life without progress, and 6 retries
        live(world, store, code, progress=False)
        assert world.job.condition is None
    live(world, store, 75, progress=False)
    assert world.job.condition is not None
    assert world.job.condition[:2] == ("Failed", "PodFailurePolicy")


def test_an_index_that_cannot_begin_fails_the_job_when_its_retries_are_used() -> None:
    """Python exits with 1 before the pod can count its life, so Kubernetes counts the failure."""
    job = rendered("producer", "processes.producers=3", "cluster.producer.retries=2")
    world = World(job)
    for life in range(3):
        assert world.job.condition is None
        world.end(0, 1)
        world.end(1, 75)
        if life < 2:
            world.end(2, 1)
        for _ in world.pass_to(world.now + HOUR):
            pass
    world.job.reconcile()  # the other pods get SIGTERM
    assert world.job.condition is not None
    assert world.job.condition[:2] == ("Failed", "MaxFailedIndexesExceeded")
