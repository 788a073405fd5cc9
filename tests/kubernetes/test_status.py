"""The status view of pods, store and metrics, also if one of them is unreachable."""

import json
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import dist_sae.kubernetes.cluster
from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.config import load_run
from dist_sae.data.consumers import Consumers
from dist_sae.storage import open_store
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.telemetry.gather import GatheredTelemetry
from dist_sae.telemetry.history import History
from tests.index.outline import write_outline
from tests.kubernetes.apiserver import ApiServer, Object
from tests.kubernetes.conftest import Shell


def status(sh: Shell, path: str, *options: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(sh("status", path, "--json", *options).splitlines()[-1])
    return found


def terminated(code: int, reason: str, message: str, at: str) -> Object:
    ended = {"exitCode": code, "reason": reason, "message": message, "finishedAt": at}
    return {"containerStatuses": [{"name": "main", "state": {"terminated": ended}}]}


def waiting(reason: str, message: str) -> Object:
    state = {"waiting": {"reason": reason, "message": message}}
    return {"phase": "Pending", "containerStatuses": [{"name": "main", "state": state}]}


@pytest.fixture
def going(sh: Shell, path: str) -> str:
    """A run with 3 of 4 units in the store, whose trainers are at step 8 of 16."""
    sh("plan", path)
    run = load_run(path)
    activations, runs = (
        open_store(url, run.store.s3) for url in (run.store.activations, run.store.runs)
    )
    for unit in (0, 1, 2, 4):  # unit 4 is held out
        activations.put(f"units/{unit:08d}.json", b"{}")
    Consumers(activations, 24.0).report("tiny", reached=1, needed=0)
    Checkpoints(runs, "tiny", 2).commit(8, [], {})
    history = History(runs, "tiny", 0)
    for step, fvu in ((4, 0.5), (8, 0.25)):
        numbers = {"fvu": fvu, "rows_per_second": 100.0, "phases": {"wait": 3.0, "forward": 1.0}}
        history.append({"step": step, "rows": 256 * step, **numbers})
    history.flush()
    return path


@pytest.mark.system
def test_pods_are_listed_page_by_page(
    api: ApiServer, sh: Shell, going: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sh("submit", going)
    for pod in api.pods("producer"):
        api.run_pod(pod)
    at_once = status(sh, going)["parts"]
    assert at_once["producer"]["running"] == 2
    monkeypatch.setattr(dist_sae.kubernetes.cluster, "PAGE_OBJECTS", 1)
    assert status(sh, going)["parts"] == at_once


def workload(uid: str, **conditions: tuple[str, str, str]) -> Object:
    said = [
        {"type": kind, "status": holds, "reason": reason, "message": message}
        for kind, (holds, reason, message) in conditions.items()
    ]
    return {
        "apiVersion": "kueue.x-k8s.io/v1beta2",
        "kind": "Workload",
        "metadata": {"name": f"jobset-{uid}", "labels": {"kueue.x-k8s.io/job-uid": uid}},
        "spec": {"queueName": "gpus"},
        "status": {"conditions": said},
    }


def warning(about: Object, message: str, kind: str = "Warning") -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "type": kind,
        "reason": "FailedCreate",
        "message": message,
        "involvedObject": {key: about["metadata"][key] for key in ("name", "uid")},
        "metadata": {"name": f"{about['metadata']['name']}.{len(message)}"},
    }


@pytest.mark.system
def test_status_says_why_a_run_is_queued(api: ApiServer, sh: Shell, path: str) -> None:
    sh("submit", path)
    assert "unreachable: " not in sh("status", path)  # the cluster has no Kueue
    api.groups.add("kueue.x-k8s.io")
    uid = api.the("JobSet", "tiny")["metadata"]["uid"]
    short = "couldn't assign flavors to pod set trainer: insufficient unused quota, 8 more needed"
    api.create(
        workload(
            uid,
            QuotaReserved=("False", "Pending", short),
            Evicted=("True", "Preempted", "for a workload of higher priority"),
        )
    )
    api.create(workload("other", QuotaReserved=("False", "Pending", "not ours")))
    job = api.the("Job", "tiny-trainer-0")
    for event in (
        warning(job, "exceeded quota: an earlier one"),
        warning(job, "exceeded quota: pods"),
        warning(job, "no warning", "Normal"),
        warning({"metadata": {"name": "tiny-trainer-0", "uid": "of another"}}, "not ours"),
    ):
        api.create(event)
    found = status(sh, path)
    assert found["queued"] == [
        "queue gpus: evicted (Preempted): for a workload of higher priority",
        f"queue gpus: {short}",
    ]
    assert found["events"] == ["tiny-trainer-0 FailedCreate: exceeded quota: pods"]
    shown = sh("status", path)
    assert f"queued   queue gpus: {short}" in shown
    assert "event    tiny-trainer-0 FailedCreate: exceeded quota: pods" in shown

    admitted = workload(uid, Evicted=("True", "Preempted", ""), Admitted=("True", "Admitted", ""))
    api.set("Workload", f"jobset-{uid}", status=admitted["status"])
    assert status(sh, path)["queued"] == []
    in_part = admitted["status"] | {
        "admission": {"podSetAssignments": [{"name": "main", "count": 600}]}
    }
    spec = {"queueName": "gpus", "podSets": [{"name": "main", "count": 1000, "minCount": 10}]}
    api.set("Workload", f"jobset-{uid}", status=in_part, spec=spec)
    said = "queue gpus: admitted 600 of 1000 pods (no room for more)"
    assert status(sh, path)["queued"] == [said]
    api.rules.remove(("", "events", "list"))
    assert "may not list events" in status(sh, path)["out_of_reach"]["queue and events"]


@pytest.mark.system
def test_status_joins_pods_store_and_history(api: ApiServer, sh: Shell, going: str) -> None:
    sh("submit", going)
    first, second = api.pods("producer")
    api.run_pod(first)
    crash = terminated(1, "Error", "log line\nValueError: boom", "2026-01-01T01:00:00Z")
    stop = terminated(75, "Error", "stopped: at step 3", "2026-01-01T02:00:00Z")
    third = api.fail_pod(api.fail_pod(second, **stop), **crash)
    api.set("Pod", third, status=waiting("ImagePullBackOff", "no such image"))
    lost = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
    (waits, _) = api.pods("trainer")
    unschedulable = {"conditions": [{**lost, "message": "0/3 nodes are available"}]}
    api.set("Pod", waits, status={"phase": "Pending", **unschedulable})
    api.condition("JobSet", "tiny", "StartupPolicyInProgress", "jobs are starting")

    found = status(sh, going)
    assert found["state"] == "running"
    assert found["parts"]["producer"] == {
        "wanted": 2,
        "running": 1,
        "ready": 1,
        "done": 0,
        "restarts": 2,
        "last_end": f"{second}: exit 75 (stopped, resumable): stopped: at step 3",
        "pending": [f"{third}: ImagePullBackOff: no such image"],
    }
    assert found["parts"]["trainer"]["pending"] == [
        f"{waits}: Unschedulable: 0/3 nodes are available"
    ]
    assert found["conditions"] == ["JobSet tiny StartupPolicyInProgress: jobs are starting"]
    store = found["store"]
    assert 0 <= store.pop("checkpoint_age_seconds") < 600
    assert len(store.pop("plan")) > 8
    assert store == {
        "units": 4,
        "ready_units": 3,
        "reached_unit": 1,
        "backlog_units": 2,
        "steps": 16,
        "checkpoint_step": 8,
        "index": None,
    }
    assert found["limit"] == "data: trainers wait 75% of the time"
    assert found["limit_of"] == "the last saved report, over all ranks"
    assert found["numbers"] == {
        "step": 8,
        "fvu": 0.25,
        "rows_per_second": 100.0,
        "phases": {"wait": 3.0, "forward": 1.0},
        "from": "the run's history",
    }
    assert found["warnings"] == []
    assert found["out_of_reach"].keys() == {"metrics"}  # of the running producer

    shown = sh("status", going)
    assert "tiny in dist-sae: running" in shown
    assert f"pending  {third}: ImagePullBackOff: no such image" in shown
    assert "store    3 of 4 units ready, training is at unit 1, backlog 2" in shown
    assert "saved    step 8 of 16, " in shown
    assert "training step 8  fvu 0.250  100 rows/s  (the run's history)" in shown


@pytest.mark.system
@pytest.mark.parametrize(
    ("ended", "words"),
    [
        (terminated(137, "OOMKilled", "", "2026-01-01T01:00:00Z"), "exit 137 (OOMKilled)"),
        (terminated(2, "Error", "error: x", "2026-01-01T01:00:00Z"), "exit 2 (something to fix)"),
        ({"reason": "Evicted", "message": "disk pressure"}, "Evicted: disk pressure"),
        (
            {
                "conditions": [
                    {
                        "type": "DisruptionTarget",
                        "status": "True",
                        "reason": "PreemptionByScheduler",
                        "message": "preempted",
                    }
                ],
                **terminated(143, "Error", "", "2026-01-01T01:00:00Z"),
            },
            "PreemptionByScheduler: preempted",
        ),
    ],
    ids=["memory", "user", "evicted", "preempted"],
)
def test_status_says_why_a_pod_ended(
    api: ApiServer, sh: Shell, path: str, ended: Object, words: str
) -> None:
    sh("submit", path)
    pod = api.pods("trainer")[0]
    api.fail_pod(pod, **ended)
    assert status(sh, path)["parts"]["trainer"]["last_end"].startswith(f"{pod}: {words}")


@pytest.mark.system
def test_status_says_how_far_the_index_is(api: ApiServer, sh: Shell, going: str) -> None:
    sh("submit", going)
    write_outline(load_run(going), 8, encoded=2, merged=0)
    (pod,) = api.pods("index")
    assert status(sh, going)["parts"]["index"]["wanted"] == 1
    shown = sh("status", going)
    assert "index    2 of 3 units encoded, 0 of 2 buckets merged\n" in shown
    api.run_pod(pod)
    with Telemetry("tiny", "index", 0) as telemetry:
        assert telemetry.port
        api.ports[pod] = telemetry.port
        assert status(sh, going)["index_rows_per_second"] is None
        telemetry.set("dist_sae_index_rows_per_second", 12_300.4)
        found = status(sh, going)
        assert found["index_rows_per_second"] == 12_300.4
        assert found["store"]["index"] == {
            "units": 3,
            "encoded_units": 2,
            "buckets": 2,
            "merged_buckets": 0,
        }
        assert "0 of 2 buckets merged, 12,300 rows/s on the first worker" in sh("status", going)


@pytest.mark.system
def test_status_of_a_sweep_has_a_line_for_each_job(
    api: ApiServer, sh: Shell, path: str, tmp_path: Path
) -> None:
    """The sweep is one JobSet.

    One job's numbers come from the trainer, and the other's from its history.
    """
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(Path(path).read_text() + "\nsweep: {over: {sae.k: [2, 4]}}\n")
    sh("submit", str(sweep))
    assert api.the("JobSet", "tiny")
    run = load_run(sweep)
    runs = open_store(run.store.runs, run.store.s3)
    for name, step in (("tiny-k2", 4), ("tiny-k4", 8)):
        Checkpoints(runs, name, 2).commit(step, [], {})
    history = History(runs, "tiny-k4", 0)
    history.append({"step": 8, "fvu": 0.25, "phases": {"forward": 1.0}})
    history.flush()
    pod = api.pods("trainer")[0]
    api.run_pod(pod)
    with Telemetry("tiny", "train", 0, jobs=["tiny-k2"]) as telemetry:
        assert telemetry.port
        api.ports[pod] = telemetry.port
        telemetry.set("dist_sae_train_step", 5)
        telemetry.set("dist_sae_train_fvu", 0.5)
        shown = sh("status", str(sweep)).splitlines()
    saved = [line for line in shown if line.startswith("saved ")]
    assert [(line.split()[2], line.split()[-1]) for line in saved] == [
        ("4", "tiny-k2"),
        ("8", "tiny-k4"),
    ]
    training = [line for line in shown if line.startswith("training ")]
    assert training == [
        f"training step 5  fvu 0.500  (pod {pod})  tiny-k2",
        "training step 8  fvu 0.250  (the run's history)  tiny-k4",
    ]


@pytest.mark.system
def test_status_asks_the_first_trainer_for_its_numbers(
    api: ApiServer, sh: Shell, going: str
) -> None:
    sh("submit", going)
    pod = api.pods("trainer")[0]
    api.run_pod(pod)
    producer = api.pods("producer")[0]
    api.run_pod(producer)
    with Telemetry("tiny", "train", 0) as telemetry, Telemetry("tiny", "produce", 0) as producing:
        assert telemetry.port
        assert producing.port
        api.ports |= {pod: telemetry.port, producer: producing.port}
        producing.add("dist_sae_produce_seconds_total", 9, stage="store")
        producing.add("dist_sae_produce_seconds_total", 5, stage="forward")
        telemetry.set("dist_sae_train_phase_share", 0.25, phase="wait")
        telemetry.set("dist_sae_train_phase_share", 0.75, phase="backward")
        telemetry.set("dist_sae_train_step", 11)
        telemetry.set("dist_sae_train_fvu", 0.125)
        telemetry.set("dist_sae_checkpoint_seconds", 301)
        found = status(sh, going)
        assert (
            found["numbers"].items()
            >= {
                "step": 11,
                "fvu": 0.125,
                "checkpoint_seconds": 301,
                "from": f"pod {pod}",
            }.items()
        )
        assert found["limit"] == (
            "data: trainers wait 25% of the time; producers' slowest stage: store"
        )
        of = "the last report, over all ranks; for producers, all the time since the pods started"
        assert found["limit_of"] == of
        assert f"stage: store  (based on {of})" in sh("status", going)
        assert found["warnings"] == [
            "the last checkpoint took 301 s, and pods get 600 s to save and exit; raise "
            "cluster.trainer.grace_seconds"
        ]
        telemetry.set("dist_sae_checkpoint_seconds", 299)
        assert status(sh, going)["warnings"] == []
        for phase, share in (("wait", 0.0), ("backward", 0.7), ("ranks", 0.3)):
            telemetry.set("dist_sae_train_phase_share", share, phase=phase)
        slow = {"slowest": "5", "host": "tiny-trainer-0-0 on gpu-7"}
        telemetry.set_only("dist_sae_train_slowest_ratio", 1.43, **slow)
        assert status(sh, going)["limit"] == (
            "rank 5 (tiny-trainer-0-0 on gpu-7) takes 1.4 x the median rank's time; ranks wait 30% "
            "of the time"
        )

    del api.ports[pod]
    found = status(sh, going)
    assert found["numbers"]["from"] == "the run's history"
    assert found["limit_of"] == "the last saved report, over all ranks"
    assert "error trying to reach service" in found["out_of_reach"]["metrics"]
    api.rules.remove(("", "pods/proxy", "get"))
    assert "ada may not get pods/proxy" in status(sh, going)["out_of_reach"]["metrics"]


@pytest.mark.system
def test_status_sums_over_the_producers_ranks_in_a_pod(
    api: ApiServer, sh: Shell, going: str
) -> None:
    """Among ranks that share a model, only one counts; the others export zeros."""
    sh("submit", going)
    with ExitStack() as stack:
        for part, role in (("trainer", "train"), ("producer", "produce")):
            ranks = [stack.enter_context(Telemetry("tiny", role, 0, rank)) for rank in (0, 1)]
            if role == "train":
                ranks[0].set("dist_sae_train_phase_share", 0.4, phase="wait")
                ranks[0].set("dist_sae_train_phase_share", 0.6, phase="forward")
            else:
                ranks[0].add("dist_sae_produce_seconds_total", 9, stage="pack")
                for rank in ranks:
                    rank.add("dist_sae_produce_seconds_total", 6, stage="store")
            pod = api.pods(part)[0]
            api.run_pod(pod)
            ports = {rank: one.port for rank, one in enumerate(ranks) if one.port}
            gathered = stack.enter_context(GatheredTelemetry("tiny", role, ports, 0))
            api.ports[pod] = gathered.port
        assert status(sh, going)["limit"] == (
            "data: trainers wait 40% of the time; producers' slowest stage: store"
        )


@pytest.mark.system
def test_status_asks_a_pod_that_does_not_answer_once_and_not_for_long(
    api: ApiServer, sh: Shell, going: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist_sae.kubernetes.cluster, "POD_SECONDS", 0.2)
    sh("submit", going)
    pod = api.pods("trainer")[0]
    api.run_pod(pod)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        api.ports[pod] = silent.getsockname()[1]
        began = time.monotonic()
        found = status(sh, going)
        assert time.monotonic() - began < 20  # well below the timeout of other requests
        silent.accept()[0].close()
        silent.settimeout(0)
        with pytest.raises(BlockingIOError):
            silent.accept()
    assert found["numbers"]["from"] == "the run's history"
    assert found["out_of_reach"]["metrics"].endswith(
        f"pod {pod} does not respond on port 9400 within 0.2 s; check whether a network policy "
        "blocks the API server"
    )


@pytest.mark.system
def test_status_tells_what_is_left_without_the_cluster(
    sh: Shell, going: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    found = status(sh, going)
    assert found["state"] == "unknown"
    assert found["store"]["checkpoint_step"] == 8
    assert found["numbers"]["step"] == 8
    assert found["out_of_reach"]["cluster"].startswith(
        f"{tmp_path}/none: cannot use the kubeconfig"
    )
    assert f"cluster unreachable: {tmp_path}/none: cannot use the kube" in sh("status", going)


def test_status_tells_what_is_left_without_the_store(api: ApiServer, sh: Shell, path: str) -> None:
    sh("submit", path)
    found = status(sh, path, "--set", "store.runs=s3://no-such-bucket/runs")
    assert found["parts"]["producer"]["wanted"] == 2
    assert found["store"] is None
    assert found["out_of_reach"]["store"].startswith("s3://no-such-bucket/runs: no such bucket")


def test_status_of_a_run_that_nobody_submitted_says_so(
    api: ApiServer, sh: Shell, path: str
) -> None:
    found = status(sh, path)
    assert found["state"] == "absent"
    assert found["store"]["plan"].endswith("has no plan yet; run `dist-sae plan` first")
    assert "saved    no checkpoint yet; 16 steps in total" in sh("status", path)


@pytest.mark.system
def test_watch_shows_what_changes_until_interrupted(
    api: ApiServer, sh: Shell, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sh("submit", path)
    naps = 0

    def nap(seconds: float) -> None:
        nonlocal naps
        naps += 1
        if naps == 2:
            raise KeyboardInterrupt
        api.condition("JobSet", "tiny", "Completed", "all jobs are complete")

    monkeypatch.setattr(time, "sleep", nap)
    shown = sh("status", path, "--watch")
    assert "tiny in dist-sae: complete" in shown
