"""The test pod runner behaves as Kubernetes documents, shown with one-line shell pods."""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.forks import HANG_SECONDS
from tests.kubernetes.controllers import Condition, Job
from tests.kubernetes.kubelet import Pod
from tests.kubernetes.manifests import Object
from tests.kubernetes.podrunner import Cluster
from tests.kubernetes.sandbox import REPOSITORY

pytestmark = pytest.mark.system

RULES = [
    {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}},
    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [75]}},
]
UNTIL_TOLD = "trap 'exit 75' TERM; sleep 60 & echo up; wait"
UNTIL_TOLD_WRONG = UNTIL_TOLD.replace("75", "2")


def make_job(name: str, script: str, *, n: int = 1, **container: Any) -> Object:
    """Return an Indexed Job of `n` pods that run a script."""
    spec = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 1,
        "containers": [{"name": "main", "command": ["sh", "-euc", script], **container}],
        "volumes": [
            {"name": "kept", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    job = {
        "completionMode": "Indexed",
        "completions": n,
        "parallelism": n,
        "backoffLimit": 1,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": RULES},
        "template": {"metadata": {"labels": {"of": name}}, "spec": spec},
    }
    return {"kind": "Job", "metadata": {"name": name}, "spec": job}


def run(cluster: Cluster, manifest: Object) -> Job:
    """Run a Job to its end."""
    cluster.apply([manifest])
    job = cluster.jobs[manifest["metadata"]["name"]]
    cluster.wait(lambda: job.condition)
    return job


def await_up(cluster: Cluster, pod: Pod) -> Pod:
    """Wait until a pod has logged that it is up."""
    deadline = time.monotonic() + HANG_SECONDS
    while "up" not in pod.log():
        assert time.monotonic() < deadline, cluster.story()
        time.sleep(0.01)
    return pod


def next_life(cluster: Cluster, job: Job, lives: int) -> Pod:
    """Wait until a Job's only pod is up, after `lives` earlier pods."""
    cluster.wait(lambda: job.active and len(job.pods) == lives + 1)
    return await_up(cluster, job.active[0])


def test_a_container_has_what_its_manifest_gives_and_no_more(cluster: Cluster) -> None:
    cluster.apply(
        [
            {"kind": "ConfigMap", "metadata": {"name": "map"}, "data": {"file": "of the map"}},
            {"kind": "Secret", "metadata": {"name": "keys"}, "data": {"KEY": "c2VjcmV0"}},
        ]
    )
    script = f"""
        test "$(id -u) $(id -g) $(id -G)" = "10001 10002 10002 10003"
        grep -q "CapBnd:.0*$" /proc/self/status
        grep -q "NoNewPrivs:.1" /proc/self/status
        for place in / /etc /etc/there {REPOSITORY}; do
            touch $place/new 2>&1 | grep "Read-only file system"
        done
        touch /kept/new /dev/shm/new
        test "$(stat -f -c %T /dev/shm)" = tmpfs
        test "$(cat /etc/there/file)" = "of the map"
        test "$KEY $ADDED $PLAIN" = "secret <secret> $"'(KEY)'
        test "$(hostname) $JOB_COMPLETION_INDEX" = "alone-0 0"
        test "${{POD#alone-0-}}" != "$POD"
        test "$(pwd)" = /tmp
        test "$(cat /proc/1/comm)" = sh
        dist-sae --version
    """
    manifest = make_job(
        "alone",
        script,
        envFrom=[{"secretRef": {"name": "keys"}}],
        env=[
            {"name": "ADDED", "value": "<$(KEY)>"},
            {"name": "PLAIN", "value": "$$(KEY)"},
            {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        ],
        securityContext={
            "readOnlyRootFilesystem": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
        volumeMounts=[
            {"name": "map", "mountPath": "/etc/there", "readOnly": True},
            {"name": "kept", "mountPath": "/kept"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    )
    pod = manifest["spec"]["template"]["spec"]
    pod["volumes"].append({"name": "map", "configMap": {"name": "map"}})
    pod["securityContext"] = {"runAsUser": 10001, "runAsGroup": 10002, "fsGroup": 10003}
    pod["initContainers"] = [{"name": "first", "command": ["sh", "-c", "exit 0"]}]
    job = run(cluster, manifest)
    assert job.condition == Condition("Complete", "CompletionsReached"), cluster.story()
    assert job.succeeded[0].exit_codes == {"first": 0, "main": 0}


def test_a_name_is_of_the_pod_that_has_it_now(cluster: Cluster) -> None:
    """A name resolves to the current pod: pod 0 sees pod 1 return at another address, and pod 1
    sees that pod 0's name is gone.
    """
    script = """
        address() { getent hosts $1 | cut -d' ' -f1; }
        if [ $JOB_COMPLETION_INDEX = 0 ]; then
            until old=$(address names-1.net) && [ "$old" ]; do sleep 0.02; done
            echo up
            until new=$(address names-1.net) && [ "$new" ] && [ $new != $old ]; do sleep 0.02; done
        else
            while [ "$(address names-0.net)" ]; do sleep 0.02; done
        fi
    """
    manifest = make_job("names", script, n=2)
    manifest["spec"]["template"]["spec"]["subdomain"] = "net"
    selected = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"of": "names"}}
    service = {"kind": "Service", "metadata": {"name": "net"}, "spec": selected}
    cluster.apply([service, manifest])
    job = cluster.jobs["names"]
    cluster.wait(lambda: len(job.active) == 2)
    await_up(cluster, job.active[0])
    job.active[1].lose()
    cluster.wait(lambda: job.condition)
    assert job.condition == Condition("Complete", "CompletionsReached")
    assert (len(job.ignored), len(job.counted)) == (1, 0)


def test_only_crashes_use_up_the_retries(cluster: Cluster) -> None:
    cluster.apply([make_job("lives", UNTIL_TOLD)])
    job = cluster.jobs["lives"]
    told = next_life(cluster, job, 0)
    told.terminate()
    preempted = next_life(cluster, job, 1)
    preempted.preempt()
    lost = next_life(cluster, job, 2)
    lost.lose()
    crashed = next_life(cluster, job, 3)
    crashed.kill()
    last = next_life(cluster, job, 4)
    last.kill()
    cluster.wait(lambda: job.condition)
    assert job.ignored == [told, preempted, lost]
    assert job.counted == [crashed, last]
    assert [pod.exit_codes["main"] for pod in (told, preempted, crashed)] == [75, 75, 137]
    assert job.condition is not None
    assert job.condition.reason == "BackoffLimitExceeded"


def test_a_mistake_fails_a_job_at_once_and_ends_its_other_pods(cluster: Cluster) -> None:
    script = f"if [ $JOB_COMPLETION_INDEX = 0 ]; then {UNTIL_TOLD_WRONG}; fi; {UNTIL_TOLD}"
    cluster.apply([make_job("mistake", script, n=2)])
    job = cluster.jobs["mistake"]
    cluster.wait(lambda: len(job.active) == 2)
    for pod in job.active.values():
        await_up(cluster, pod)
    job.active[0].terminate()
    cluster.wait(lambda: job.condition)
    assert job.condition is not None
    assert job.condition[:2] == ("Failed", "PodFailurePolicy")
    assert [pod.exit_codes["main"] for pod in job.counted] == [2]
    assert [pod.exit_codes["main"] for pod in job.ignored] == [75]


def test_a_container_that_hangs_is_told_to_end_and_then_killed(cluster: Cluster) -> None:
    """The container was live and ready.

    Once it is stopped, it cannot handle SIGTERM within its grace period of a second, and is killed.
    """
    probe = {
        "httpGet": {"path": "/", "port": "web"},
        "periodSeconds": 1,
        "timeoutSeconds": 1,
        "failureThreshold": 1,
    }
    manifest = make_job(
        "hangs",
        f"echo up; cd /kept; exec {sys.executable} -m http.server 8000",
        ports=[{"name": "web", "containerPort": 8000}],
        volumeMounts=[{"name": "kept", "mountPath": "/kept"}],
        startupProbe=probe | {"failureThreshold": 300},
        livenessProbe=probe,
        readinessProbe=probe,
    )
    manifest["spec"]["backoffLimit"] = 0
    cluster.apply([manifest])
    pod = next_life(cluster, cluster.jobs["hangs"], 0)
    cluster.wait(lambda: pod.ready)
    for process, _ in pod.processes():
        os.kill(process, signal.SIGSTOP)
    cluster.wait(lambda: pod.exit_codes)
    assert pod.exit_codes == {"main": 137}
    assert not pod.ready
    cluster.wait(lambda: cluster.jobs["hangs"].condition)


def test_jobs_of_a_jobset_begin_after_one_another_and_fail_together(cluster: Cluster) -> None:
    def replicated(name: str, script: str, after: tuple[str, str] | None = None) -> Object:
        job = make_job(name, script)
        item = {"name": name, "template": {"metadata": {}, "spec": job["spec"]}}
        named = zip(("name", "status"), after or (), strict=False)
        return item | ({"dependsOn": [dict(named)]} if after else {})

    spec = {
        "network": {"enableDNSHostnames": True, "subdomain": "set"},
        "failurePolicy": {
            "maxRestarts": 0,
            "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
        },
        "replicatedJobs": [
            replicated("first", "getent hosts set-first-0-0.set"),
            replicated("second", UNTIL_TOLD, ("first", "Complete")),
            replicated("third", UNTIL_TOLD_WRONG, ("second", "Ready")),
            replicated("never", "true", ("second", "Complete")),
        ],
    }
    cluster.apply([{"kind": "JobSet", "metadata": {"name": "set"}, "spec": spec}])
    jobset = cluster.jobsets["set"]
    cluster.wait(lambda: "third" in jobset.jobs)
    for name in ("second", "third"):
        next_life(cluster, jobset.jobs[name][0], 0)
    jobset.jobs["third"][0].active[0].terminate()
    cluster.wait(lambda: jobset.condition and not jobset.jobs["second"][0].active)
    assert jobset.condition is not None
    assert jobset.condition[:2] == ("Failed", "FailJobSetFailurePolicyAction")
    assert "set-third-0 failed (PodFailurePolicy: container main of" in jobset.condition.message
    (second,) = jobset.jobs["second"]
    assert [pod.exit_codes["main"] for pod in second.ignored] == [75]
    assert second.condition is None  # it was deleted when the JobSet ended
    assert "never" not in jobset.jobs


def test_what_the_runner_does_not_know_is_refused(cluster: Cluster) -> None:
    manifest = make_job("unknown", "true", lifecycle={"preStop": {}})
    with pytest.raises(NotImplementedError, match="container: this runner does not know lifecycle"):
        cluster.apply([manifest])


def test_nothing_outlives_a_cluster(tmp_path: Path) -> None:
    def crash(cluster: Cluster) -> None:
        cluster.apply([make_job("stays", UNTIL_TOLD, n=2)])
        job = cluster.jobs["stays"]
        cluster.wait(lambda: len(job.active) == 2)
        pods = [await_up(cluster, pod) for pod in job.active.values()]
        ends.extend(os.pidfd_open(p) for pod in pods for p, _ in pod.processes())
        raise ZeroDivisionError

    ends: list[int] = []
    with (
        pytest.raises(ZeroDivisionError),
        Cluster(tmp_path) as cluster,
    ):  # on exit, the cluster reports what is left
        crash(cluster)
    assert len(ends) >= 4
    for end in ends:
        assert select.select([end], [], [], 0)[0]
        os.close(end)
    assert not list(Path("/dev/shm").glob(f"{cluster.network.name}*"))


def test_what_a_killed_test_has_left_is_removed(tmp_path: Path) -> None:
    gone = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True)
    left = f"ds{int(gone.stdout):06x}a"
    subprocess.run(["ip", "netns", "add", left], check=True)
    subprocess.run(["ip", "link", "add", left, "type", "bridge"], check=True)
    with Cluster(tmp_path):
        assert not Path("/run/netns", left).exists()
        assert not Path("/sys/class/net", left).exists()
