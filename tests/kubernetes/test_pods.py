"""Rendered runs on a test cluster, whose pods are started from their manifests alone.

The synthetic model is small, but the programs, the S3 server and the signals are real. Every
disturbed run is compared with one undisturbed run. The undisturbed run's planner, producers and
trainers start as on a cluster, and all other pods start from preloaded modules. Units are withheld
from a run that will be disturbed, so that it cannot end too early.
"""

import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGKILL
from typing import NamedTuple

import pytest
import torch

from dist_sae.checkpoint.layout import Checkpoint, Checkpoints
from dist_sae.config import Run, load_run
from dist_sae.data.shard import CLAIMS, manifest_key
from dist_sae.index.progress import is_indexed
from dist_sae.kubernetes.jobs import job_name, render_objects
from dist_sae.kubernetes.pods import ATTEMPT_KEY
from dist_sae.storage import ObjectStore, open_store
from dist_sae.telemetry.history import read_history
from tests.forks import HANG_SECONDS
from tests.kubernetes.controllers import Condition, Job, JobSet
from tests.kubernetes.kubelet import Pod
from tests.kubernetes.podrunner import Cluster
from tests.servers import OWNER, seaweedfs

pytestmark = pytest.mark.system

RUN = Path(__file__).parents[2] / "launch/runs/synthetic-topk-cluster.yaml"
SMALL = (
    "model.d_in=32",
    "model.n_features=64",
    "sae.n_latents=64",
    "sae.auxk=16",
    "corpus.documents=500",
    "activations.unit_rows=1024",
    "activations.block_rows=128",
    "activations.window_units=2",
    "train.rows=25_600",
    "train.batch_rows=256",
    "train.normaliser_rows=5_000",
    "train.products=fp32",
    "cluster.env.CXX=none",  # otherwise every pod would compile the native kernels again
    "train.log_every_steps=1",
    "train.save_every_steps=10",
    "timeouts.lost_seconds=10",
)
WEIGHTS = ("W_enc", "W_dec", "b_enc", "b_dec")
UNIT_OF_WINDOW_2, UNIT_OF_WINDOW_3 = 8, 16
"""Units of the first of four streams.

A batch takes rows of every stream, so training stops after 33 of 100 steps without the first of
these units, and after 66 without the second.
"""
COMPLETE = Condition("Complete", "CompletionsReached")
COMPLETED = Condition("Completed", "AllJobsCompleted")


class Outcome(NamedTuple):
    """A run's results in the store."""

    checkpoint: Checkpoint
    fvu: list[float]


class Runs:
    """Runs on one cluster that share an S3 server."""

    def __init__(self, cluster: Cluster, endpoint_url: str) -> None:
        self.cluster = cluster
        self._endpoint_url = endpoint_url

    def run(self, name: str, *settings: str, activations: str | None = None) -> Run:
        where = (
            f"name={name}",
            f"store.activations=s3://dist-sae/{activations or name}",
            f"store.s3.endpoint_url={self._endpoint_url}",
        )
        return load_run(RUN, [*SMALL, *where, *settings])

    def submit(self, run: Run) -> JobSet:
        self.cluster.apply(render_objects(run))
        return self.cluster.jobsets[run.name]

    def store(self, url: str, run: Run) -> ObjectStore:
        return open_store(url, run.store.s3)

    def job(self, run: Run, part: str) -> Job:
        """Wait for a Job to start, and return it."""
        jobs, name = self.cluster.jobs, job_name(run, part)  # type: ignore[arg-type]
        self.cluster.wait(lambda: name in jobs and jobs[name].pods)
        return jobs[name]

    def until(self, what: Callable[[], object], seconds: float = HANG_SECONDS) -> None:
        """Poll the store until a condition holds."""
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, self.cluster.story()
            time.sleep(0.2)  # each poll costs time on the test and the server

    def withhold(self, run: Run, unit: int) -> Callable[[], None]:
        """Remove a unit and claim it, as if another producer were writing it.

        Returns a function that restores the unit.

        A producer takes the claim over by itself once it is three minutes old.
        """
        store = self.store(run.store.activations, run)
        key = manifest_key(unit)
        manifest = None if store.size(key) is None else store.get(key)
        store.put(CLAIMS.key(unit), b"{}")
        store.delete(key)

        def give_back() -> None:
            if manifest is not None:
                store.put(key, manifest)
            store.delete(CLAIMS.key(unit))

        return give_back

    def await_checkpoint(self, run: Run, beyond: int) -> None:
        checkpoints = Checkpoints(self.store(run.store.runs, run), run.name, 2)
        self.until(lambda: checkpoints.steps()[-1:] > [beyond])

    def await_waiting(self, pod: Pod, what: str) -> None:
        """Wait until a pod logs that it waits.

        A pod with probes must also have started, according to its probe.
        """
        self.until(lambda: f"waiting for {what}" in pod.log())
        probed = "startupProbe" in pod.spec["containers"][0]
        self.cluster.wait(lambda: pod.has_started or not probed)

    def outcome(self, run: Run) -> Outcome:
        store = self.store(run.store.runs, run)
        checkpoint = Checkpoints(store, run.name, 2).latest()
        assert checkpoint is not None
        assert checkpoint.step == run.steps
        return Outcome(checkpoint, [record["fvu"] for record in read_history(store, run.name)])


@pytest.fixture(scope="module")
def runs(cluster: Cluster) -> Iterator[Runs]:
    keys = {"AWS_ACCESS_KEY_ID": OWNER.id, "AWS_SECRET_ACCESS_KEY": OWNER.secret}
    secret = {"kind": "Secret", "metadata": {"name": "s3-credentials"}, "stringData": keys}
    with seaweedfs(cluster.network.gateway) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in keys.items():
            patch.setenv(name, value)
        server.client().create_bucket(Bucket="dist-sae")
        cluster.apply([secret])
        yield Runs(cluster, server.endpoint_url)


class Calm(NamedTuple):
    """An undisturbed run, which the disturbed ones are compared with."""

    run: Run
    jobset: JobSet
    outcome: Outcome


@pytest.fixture(scope="module")
def calm(runs: Runs) -> Calm:
    run = runs.run("calm")
    jobset = runs.submit(run)
    trainer = runs.job(run, "trainer")
    runs.cluster.wait(
        lambda: jobset.condition or sum(pod.has_started for pod in trainer.active.values()) == 2
    )
    runs.cluster.preload()  # the index and reporter import few other modules
    runs.cluster.wait(lambda: jobset.condition)
    assert jobset.condition == COMPLETED, runs.cluster.story()
    runs.cluster.delete(run.name)
    return Calm(run, jobset, runs.outcome(run))


def exit_code(pod: Pod) -> int:
    return pod.exit_codes["main"]


def resumed_at(pod: Pod) -> int:
    found = re.search(r"resuming at step (\d+)", pod.log())
    assert found, pod.log()
    return int(found[1])


def printed_units(pod: Pod) -> int:
    """Return the number of units that a producer printed at its end."""
    found = re.search(r"^units +(\d+)$", pod.log(), re.MULTILINE)
    assert found, pod.log()
    return int(found[1])


def test_a_jobset_runs_to_its_end(runs: Runs, calm: Calm) -> None:
    keys = set(runs.store("s3://dist-sae", calm.run).keys())
    assert {
        "runs/calm/evaluation.json",
        "runs/calm/export/cfg.json",
        "runs/calm/report/report.html",
        f"runs/calm/index/step-{calm.run.steps:08d}/buckets/00000000.json",
    } <= keys
    jobs = {name: job for name, (job,) in calm.jobset.jobs.items()}
    assert list(jobs) == ["planner", "trainer", "producer", "index", "reporter"]
    assert {name: len(job.succeeded) for name, job in jobs.items()} == {
        "planner": 1,
        "producer": 2,
        "trainer": 2,
        "index": 2,
        "reporter": 1,
    }
    assert not [pod for job in jobs.values() for pod in (*job.counted, *job.ignored)]
    assert all(pod.has_started for pod in jobs["trainer"].succeeded.values())
    # not both need to have units: one that starts late may find that the other has produced all
    made = Counter(manifest["producer"] for manifest in manifests(runs, calm.run))
    assert made == Counter(
        {pod.name: printed_units(pod) for pod in jobs["producer"].succeeded.values()}
    )


def manifests(runs: Runs, run: Run) -> list[dict[str, object]]:
    store = runs.store(run.store.activations, run)
    return [json.loads(store.get(key)) for key in store.keys("units/")]


def producers_of(runs: Runs, run: Run) -> set[object]:
    """Return the names of the pods that have produced units."""
    return {manifest["producer"] for manifest in manifests(runs, run)}


def test_pods_that_are_preempted_and_killed_change_nothing(runs: Runs, calm: Calm) -> None:
    run = runs.run("disturbed", "cluster.reporter=null")
    window_2, window_3 = (runs.withhold(run, u) for u in (UNIT_OF_WINDOW_2, UNIT_OF_WINDOW_3))
    jobset, cluster = runs.submit(run), runs.cluster

    producer = runs.job(run, "producer")
    runs.until(lambda: producers_of(runs, run))
    names = producers_of(runs, run)
    spot = next(pod for pod in producer.active.values() if pod.name in names)
    spot.preempt()

    trainer = runs.job(run, "trainer")
    runs.await_checkpoint(run, 0)
    first = dict(trainer.active)
    first[1].preempt()
    cluster.wait(lambda: len(trainer.ignored) == 2)
    assert {exit_code(pod) for pod in first.values()} == {75}
    stopped_at = Checkpoints(runs.store(run.store.runs, run), run.name, 2).steps()[-1]
    window_2()
    runs.await_checkpoint(run, stopped_at)
    second = dict(trainer.active)
    assert resumed_at(second[0]) == stopped_at
    second[0].kill()
    window_3()

    index = runs.job(run, "index")
    gone = index.active[0]
    gone.preempt()

    cluster.wait(lambda: jobset.condition)
    assert jobset.condition == COMPLETED, cluster.story()
    assert (index.ignored, index.counted) == ([gone], [])
    assert len(index.succeeded) == 2
    assert is_indexed(run)
    assert trainer.counted == []  # pods count their own lives, and have made progress since
    assert exit_code(second[0]) == 137
    assert set(trainer.ignored) == {*first.values(), *second.values()}
    assert exit_code(second[1]) == 75
    assert resumed_at(trainer.succeeded[0]) > stopped_at
    assert (producer.ignored, producer.counted) == ([spot], [])
    assert exit_code(spot) == 75
    made = manifests(runs, run)
    assert len(made) == len(manifests(runs, calm.run))
    assert producers_of(runs, run) > {spot.name}
    found = runs.outcome(run)
    assert found.fvu == calm.outcome.fvu
    for name in WEIGHTS:
        assert torch.equal(found.checkpoint.read(name), calm.outcome.checkpoint.read(name)), name


def test_a_run_goes_on_with_more_ranks_and_ends_though_a_node_is_lost(
    runs: Runs, calm: Calm
) -> None:
    """A run that starts with two ranks is deleted, and submitted again with four ranks in two pods.

    Then one rank is killed.

    At the end the second pod's node becomes unreachable. The pod is given up after the first pod
    has succeeded, and the rank that replaces it finds all work done.
    """
    few = "processes.producers=1", "cluster.reporter=null", "index.workers=0"
    run, cluster = runs.run("resized", *few, activations="calm"), runs.cluster
    window_2, window_3 = (runs.withhold(run, u) for u in (UNIT_OF_WINDOW_2, UNIT_OF_WINDOW_3))
    jobset = runs.submit(run)
    trainer = runs.job(run, "trainer")
    runs.await_checkpoint(run, 0)
    cluster.delete(run.name)
    assert jobset.condition is None
    assert [exit_code(pod) for pod in trainer.pods] == [75, 75]
    stopped_at = Checkpoints(runs.store(run.store.runs, run), run.name, 2).steps()[-1]
    assert stopped_at < run.steps
    window_2()

    more = "processes.trainers=4", "processes.latent_shards=2", "cluster.trainer.ranks=2"
    run = runs.run("resized", *few, *more, activations="calm")
    jobset = runs.submit(run)
    trainer = runs.job(run, "trainer")
    runs.await_checkpoint(run, stopped_at)
    first = dict(trainer.active)
    assert resumed_at(first[0]) == stopped_at
    (rank,) = [pid for pid, words in first[0].processes() if words[-2:] == ["--port-offset", "2"]]
    os.kill(rank, SIGKILL)

    def all_have_come_back() -> bool:
        pod = trainer.active.get(0, first[0])
        return pod is not first[0] and "resuming at step" in pod.log()

    runs.until(all_have_come_back)
    second = dict(trainer.active)
    second[1].cut_off = True
    window_3()
    cluster.wait(lambda: 0 in trainer.succeeded)
    second[1].lose()

    cluster.wait(lambda: jobset.condition)
    assert jobset.condition == COMPLETED, cluster.story()
    assert trainer.counted == [], cluster.story()
    assert exit_code(first[0]) == 137
    assert set(trainer.ignored) >= {first[0], first[1], second[1]}, cluster.story()
    # a pod that returned before the killed rank's pod had ended joined the old store, and restarts
    # again
    others = set(trainer.ignored) - {first[0], second[1]}
    assert {exit_code(pod) for pod in others} == {75}, cluster.story()
    assert "starting" not in trainer.succeeded[1].log()
    found = runs.outcome(run)
    assert found.fvu == pytest.approx(calm.outcome.fvu, rel=1e-5)


def test_a_mistake_fails_the_run_at_once(runs: Runs, calm: Calm) -> None:
    """The run has another learning rate under an existing name, so the trainer refuses to start and
    the producers stop.
    """
    settings = "corpus.documents=20_000", "train.lr=1e-4", "processes.trainers=1"
    run = runs.run("calm", *settings, activations="mistaken")
    jobset, cluster = runs.submit(run), runs.cluster
    cluster.wait(lambda: jobset.condition)
    producer, trainer = runs.job(run, "producer"), runs.job(run, "trainer")
    cluster.wait(lambda: not producer.active)
    assert jobset.condition is not None
    assert jobset.condition[:2] == ("Failed", "FailJobSetFailurePolicyAction")
    assert "calm-trainer-0 failed (PodFailurePolicy: container main of" in jobset.condition.message
    (refused,) = trainer.pods
    assert "error: s3://dist-sae/runs/calm: contains a run with other settings" in refused.log()
    assert len(producer.pods) == 2
    assert "reporter" not in jobset.jobs
    cluster.delete(run.name)


def test_producers_apart_end_when_a_trainer_has_failed_for_good(runs: Runs, calm: Calm) -> None:
    """This holds even for producers that are admitted later, after the trainer has failed as in the
    test above.
    """
    settings = "train.lr=1e-4", "processes.trainers=1", "cluster.producer.apart=true"
    run = runs.run("calm", *settings, activations="apart")
    configuration, *others, producers = render_objects(run)
    assert producers["metadata"]["name"] == job_name(run, "producer")
    configuration["data"][ATTEMPT_KEY] = "first"
    cluster = runs.cluster
    cluster.apply([configuration, *others])
    jobset = cluster.jobsets[run.name]
    cluster.wait(lambda: jobset.condition)
    (trainer,) = runs.job(run, "trainer").pods
    cluster.apply([producers])
    job = runs.job(run, "producer")
    cluster.wait(lambda: job.condition and not job.active)
    assert job.condition is not None
    assert job.condition[:2] == ("Failed", "PodFailurePolicy"), cluster.story()
    (ended, *_) = job.counted
    assert exit_code(ended) == 2
    assert f"stopped because {trainer.name} failed" in ended.log()
    assert "contains a run with other settings" in ended.log()
    assert not manifests(runs, run)
    cluster.delete(run.name)


def test_plain_jobs_wait_for_one_another(
    runs: Runs, calm: Calm, pytestconfig: pytest.Config
) -> None:
    """The Jobs wait even if the planner is created last."""
    if not pytestconfig.getoption("--long"):
        pytest.skip("a whole run as plain Jobs takes a minute; needs --long")
    few = "processes.producers=1", "index.workers=1"
    run, cluster = runs.run("plain", "cluster.jobset=false", *few), runs.cluster
    *others, planner, trainer, producer, index, reporter = render_objects(run)
    assert planner["metadata"]["name"] == job_name(run, "planner")
    cluster.apply([*others, producer, trainer, index, reporter])
    last = f"step {run.steps}"
    waiting = {"producer": "a plan", "trainer": "a plan", "index": last, "reporter": last}
    for part, what in waiting.items():
        (pod, *_) = runs.job(run, part).active.values()
        runs.await_waiting(pod, what)
    cluster.apply([planner])
    jobs = [runs.job(run, part) for part in ("planner", *waiting)]
    cluster.wait(lambda: all(job.condition for job in jobs))
    assert [job.condition for job in jobs] == [COMPLETE] * 5, cluster.story()
    assert not [pod for job in jobs for pod in (*job.counted, *job.ignored)]
    assert "runs/plain/report/report.html" in set(runs.store("s3://dist-sae", run).keys())
    assert runs.outcome(run).fvu == calm.outcome.fvu
