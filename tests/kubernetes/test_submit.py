"""`submit`, `cancel` and `resume` on the command line, against an API server."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.config import dump_run, load_run
from dist_sae.kubernetes.jobs import render_objects
from dist_sae.kubernetes.pods import ATTEMPT_KEY
from dist_sae.kubernetes.stored import StoredRun
from dist_sae.storage import ObjectStore, open_store
from tests.conftest import Bucket
from tests.index.outline import write_outline
from tests.kubernetes.apiserver import ApiServer, Object
from tests.kubernetes.apply import with_defaults
from tests.kubernetes.conftest import Shell, ending
from tests.runs import TINY, write_run

PLAIN = ("--set", "cluster.jobset=false")
MODES = pytest.mark.parametrize(
    "mode",
    [pytest.param(m, marks=pytest.mark.system) for m in ((), PLAIN)],
    ids=["jobset", "plain"],
)


def check_objects(api: ApiServer, path: str, *overrides: str) -> None:
    """Check that the cluster has the objects that the run file renders, apart from the attempt's
    name.
    """
    for asked in map(with_defaults, render_objects(load_run(path, overrides))):
        there = api.the(asked["kind"], asked["metadata"]["name"])
        there.get("data", {}).pop(ATTEMPT_KEY, None)
        assert [there.get(k) for k in ("spec", "data")] == [asked.get(k) for k in ("spec", "data")]


def versions(api: ApiServer) -> dict[Any, str]:
    return {key: obj["metadata"]["resourceVersion"] for key, obj in api.objects.items()}


def train(path: str) -> ObjectStore:
    """Write what trainers write, and return the store."""
    run = load_run(path)
    store = open_store(run.store.runs, run.store.s3)
    store.put("tiny/run.yaml", dump_run(run).encode())
    Checkpoints(store, "tiny", 2).commit(run.steps, [], {})
    return store


@MODES
def test_submit_creates_what_the_run_asks_for_once(
    api: ApiServer, sh: Shell, path: str, mode: tuple[str, ...]
) -> None:
    said = sh("submit", path, *mode)
    assert "create ConfigMap tiny\n" in said
    check_objects(api, path, *mode[1:])
    assert len(api.names("JobSet")) == (0 if mode else 1)

    before = versions(api)
    assert "dist-sae/tiny already exists (running); nothing to change" in sh("submit", path, *mode)
    assert versions(api) == before


@MODES
def test_dry_run_shows_and_changes_nothing(
    api: ApiServer, sh: Shell, path: str, mode: tuple[str, ...]
) -> None:
    said = sh("submit", path, "--dry-run", *mode)
    assert "create ConfigMap tiny\n" in said
    assert "dry run: nothing was changed" in said
    assert not api.objects

    sh("submit", path, *mode)
    before = versions(api)
    larger = sh("submit", path, "--dry-run", *mode, "--set", "processes.producers=3")
    assert "+      producers: 3\n" in larger  # a diff of run.yaml in the ConfigMap
    assert "differs from the run on the cluster: processes.producers: 2 -> 3\n" in larger
    assert versions(api) == before


def test_result_of_submit_is_one_object(api: ApiServer, path: str, sh: Shell) -> None:
    result = json.loads(sh("submit", path, "--json"))
    created = dict.fromkeys(("ConfigMap tiny", "NetworkPolicy tiny", "JobSet tiny"), "create")
    assert result == {"outcome": "created", "objects": created}
    assert json.loads(sh("submit", path, "--json"))["outcome"] == "unchanged"


def test_run_of_another_configuration_is_left_alone(api: ApiServer, sh: Shell, path: str) -> None:
    sh("submit", path)
    before = versions(api)
    for options in ([], ["--replace"]):
        said = sh.fail("submit", path, "--set", "sae.k=1", *options)
        assert said == (
            "dist-sae/tiny on the cluster: has other settings (sae.k: 2 -> 1); "
            "restore them or choose another name"
        )
    assert versions(api) == before


@pytest.mark.system
def test_another_spelling_of_a_place_is_the_same_run(
    api: ApiServer, sh: Shell, path: str, tmp_path: Path
) -> None:
    """The run is recognized on the cluster and in the store."""
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")

    def submit(model: str, *files: str) -> tuple[str, ...]:
        names = ", ".join(f"{tmp_path}/{name}" for name in files)
        return (
            *("submit", path, "--set", f"model={{kind: huggingface, path: {tmp_path}/{model}}}"),
            *("--set", f"corpus={{kind: files, files: [{names}]}}"),
            *("--set", "activations.sites=[resid_post.0]"),
        )

    first = submit("model", "a.txt", "b.txt")
    again = submit("link", "./b.txt", "link/../a.txt")
    sh(*first)
    assert "with --replace, its pods save and exit" in sh.fail(*again)
    begun = dump_run(load_run(path, first[3::2]))
    run = load_run(path)
    open_store(run.store.runs, run.store.s3).put("tiny/run.yaml", begun.encode())
    assert "with --replace, its pods save and exit" in sh.fail(*again)
    said = sh.fail(*submit("link", "a.txt"))
    assert "has other settings (corpus.files: " in said
    assert "model.path" not in said


@MODES
def test_run_that_was_submitted_with_old_names_of_keys_is_the_same_run(
    api: ApiServer, sh: Shell, path: str, mode: tuple[str, ...]
) -> None:
    """The run is not changed. A diff shows what differs, without the renamed keys."""
    sh("submit", path, *mode)
    old = yaml.safe_load(api.the("ConfigMap", "tiny")["data"]["run.yaml"])
    old["processes"]["shards"] = old["processes"].pop("latent_shards")
    old["train"] |= old.pop("timeouts")
    api.set("ConfigMap", "tiny", data={"run.yaml": yaml.safe_dump(old)})
    before = versions(api)
    assert "dist-sae/tiny already exists (running); nothing to change" in sh("submit", path, *mode)
    said = sh("submit", path, "--dry-run", *mode, "--set", "processes.producers=3")
    assert "differs from the run on the cluster: processes.producers: 2 -> 3\n" in said
    changed = [line for line in said.splitlines() if line.startswith(("  +", "  -"))]
    assert "  +      producers: 3" in changed
    assert not [line for line in changed if "shards" in line or "_seconds" in line]
    assert versions(api) == before


def test_stored_run_of_another_configuration_is_left_alone(
    api: ApiServer, sh: Shell, path: str, bucket: Bucket
) -> None:
    train(path)
    said = sh.fail("submit", path, "--set", "train.lr=0.5")
    assert said.startswith(f"s3://{bucket.name}/runs/tiny: has other settings (train.lr:")
    assert not api.objects


def test_complete_run_is_not_submitted_again(api: ApiServer, sh: Shell, path: str) -> None:
    write_outline(load_run(path), 16)
    train(path).put("tiny/report/report.html", b"")
    assert "tiny is complete: step 16 is in s3://" in sh("submit", path)
    assert not api.objects
    assert "/runs/tiny: is complete at step 16" in sh.fail("resume", path)
    assert not api.objects


@pytest.mark.system
@pytest.mark.parametrize("reported", [True, False])
def test_run_is_complete_with_its_index_only(
    api: ApiServer, sh: Shell, path: str, *, reported: bool
) -> None:
    store = train(path)
    settings = [] if reported else ["--set", "cluster.reporter=null"]
    if reported:
        store.put("tiny/report/report.html", b"")
    without = ("submit", path, *settings, "--dry-run", "--set", "index.workers=0")
    assert "tiny is complete: step 16" in sh(*without)
    write_outline(load_run(path), 16, merged=1)
    assert "dry run: nothing was changed" in sh("submit", path, *settings, "--dry-run")
    write_outline(load_run(path), 16)
    assert "tiny is complete: step 16" in sh("submit", path, *settings)
    other = ("submit", path, *settings, "--dry-run", "--set", "index.examples=9")
    assert "dry run: nothing was changed" in sh(*other)
    assert not api.objects


@MODES
def test_reporter_that_failed_comes_back(
    api: ApiServer, sh: Shell, path: str, mode: tuple[str, ...]
) -> None:
    sh("submit", path, *mode)
    train(path)
    kind, name = ("Job", "tiny-reporter-0") if mode else ("JobSet", "tiny")
    api.condition(kind, name, "Failed", "BackoffLimitExceeded")
    (first,) = api.pods("reporter")
    assert "to continue: dist-sae resume" in sh("submit", path, *mode)
    assert "dist-sae/tiny is submitted" in sh("resume", path, *mode)
    (second,) = api.pods("reporter")
    assert second != first

    sh("cancel", path, *mode)
    assert "dist-sae/tiny is submitted" in sh("submit", path, *mode)


def test_report_of_an_earlier_checkpoint_is_not_the_last(tmp_path: Path) -> None:
    path = str(write_run(tmp_path, TINY))
    report = tmp_path / "runs/tiny/report/report.html"
    write_outline(load_run(path), 16)
    train(path).put("tiny/report/report.html", b"")
    assert StoredRun(load_run(path)).is_complete()
    os.utime(report, (0, 0))
    assert not StoredRun(load_run(path)).is_complete()


@MODES
def test_replace_lets_pods_save_and_then_resizes_the_run(
    api: ApiServer, sh: Shell, path: str, mode: tuple[str, ...]
) -> None:
    sh("submit", path, *mode)
    old = {pod: api.the("Pod", pod) for pod in api.names("Pod")}
    for pod in old:
        api.run_pod(pod)
    before = versions(api)
    resized = ("submit", path, *mode, "--set", "processes.trainers=4")
    assert sh.fail(*resized) == (
        "dist-sae/tiny exists with other settings (processes.trainers: 2 -> 4); with --replace, "
        "its pods save and exit, and new ones continue"
    )
    assert versions(api) == before

    with ending(api) as ended:
        said = sh(*resized, "--replace")
    assert sorted(ended) == sorted(old)
    waits = [line for line in said.splitlines() if line.startswith("waiting for ")]
    assert waits[0] == (
        f"waiting for {len(old)} pods to save and exit (at most 600 s each): {', '.join(old)}"
    )
    assert len(waits) == len(old)
    assert len(api.pods("trainer")) == 4
    check_objects(api, path, *mode[1:], "processes.trainers=4")


@pytest.mark.system
def test_what_the_cluster_would_refuse_costs_no_running_run(
    api: ApiServer, sh: Shell, path: str
) -> None:
    sh("submit", path)
    before = versions(api)

    def admission(obj: Object) -> str | None:
        bad = obj["kind"] == "JobSet" and "example.org/bad" in json.dumps(obj)
        return "no such image" if bad else None

    api.admission = admission
    bad = ("--set", "cluster.image=example.org/bad:1")
    for command in (("submit", path, "--replace", *bad), ("submit", path, "--set", "name=b", *bad)):
        said = sh.fail(*command)
        assert said.startswith("the cluster rejected JobSet ")
        assert said.endswith("denied the request: no such image")
    assert versions(api) == before


def test_what_somebody_else_has_set_is_not_overwritten(
    api: ApiServer, sh: Shell, path: str
) -> None:
    sh("submit", path)
    api.edit("JobSet", "tiny", "kubectl-edit", {"spec": {"ttlSecondsAfterFinished": 1}})
    said = sh.fail("submit", path)
    assert 'conflict with "kubectl-edit": .spec.ttlSecondsAfterFinished' in said


@pytest.mark.system
def test_object_of_somebody_else_is_left_alone(api: ApiServer, sh: Shell, path: str) -> None:
    stranger = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "tiny"}}
    api.create(stranger)
    said = sh.fail("submit", path)
    assert said == (
        "ConfigMap dist-sae/tiny already exists and does not belong to this run; "
        "choose another name"
    )
    assert "nothing to cancel" in sh("cancel", path)
    assert api.names("ConfigMap") == ["tiny"]

    api.objects.clear()
    sh("submit", path, "--set", "name=a.b")
    said = sh.fail("submit", path, "--set", "name=a-b")  # its objects would have the same name
    assert (
        said == "ConfigMap dist-sae/a-b already exists and belongs to run a.b; choose another name"
    )


def test_missing_image_is_named(api: ApiServer, sh: Shell, path: str) -> None:
    for command in ("submit", "resume"):
        said = sh.fail(command, path, "--set", "cluster.image=null")
        assert said.startswith("cluster.image: missing; build launch/Dockerfile")


@pytest.mark.parametrize("command", ["submit", "resume", "cancel", "logs"])
def test_missing_kubeconfig_is_named(
    sh: Shell, path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    said = sh.fail(command, path)
    assert said.startswith(f"{tmp_path}/none: cannot use the kubeconfig (")
    assert said.endswith("log in to the cluster, set KUBECONFIG or correct cluster.context")


def test_context_is_the_one_that_is_asked_for(
    api: ApiServer, sh: Shell, path: str, tmp_path: Path
) -> None:
    file = tmp_path / "kubeconfig"
    said = sh.fail("submit", path, "--set", "cluster.context=prod")
    assert said.startswith(f"context prod of {file}: cannot use the kubeconfig (")
    assert "with name prod in" in said

    file.write_text(file.read_text().replace("current-context: test", ""))
    assert sh.fail("submit", path).startswith(f"{file}: cannot use the kubeconfig (")
    assert "is submitted" in sh("submit", path, "--set", "cluster.context=test")


def test_cluster_that_does_not_answer_is_named(
    api: ApiServer, sh: Shell, path: str, tmp_path: Path
) -> None:
    file = tmp_path / "kubeconfig"
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        config = yaml.safe_load(file.read_text())
        config["clusters"][0]["cluster"]["server"] = url
        file.write_text(yaml.safe_dump(config))
        said = sh.fail("submit", path)
    assert said == (
        f"context test of {file}: {url} does not respond (NewConnectionError); check the network, "
        f"the context and your login"
    )


def test_refused_login_is_told(api: ApiServer, sh: Shell, path: str, tmp_path: Path) -> None:
    api.write_kubeconfig(tmp_path / "kubeconfig", token="expired")
    said = sh.fail("submit", path)
    assert (
        said
        == f"context test of {tmp_path}/kubeconfig: the cluster rejected your login; log in again"
    )


@pytest.mark.parametrize(
    ("group", "resource", "verb", "command"),
    [
        ("", "configmaps", "get", "submit"),
        ("", "configmaps", "create", "submit"),
        ("jobset.x-k8s.io", "jobsets", "patch", "submit"),
        ("batch", "jobs", "list", "cancel"),
        ("", "pods", "list", "logs"),
    ],
)
def test_missing_permission_is_named(
    api: ApiServer, sh: Shell, path: str, group: str, resource: str, verb: str, command: str
) -> None:
    api.rules.remove((group, resource, verb))
    said = sh.fail(command, path)
    assert said.endswith(
        f": ada may not {verb} {resource} in namespace dist-sae; role dist-sae-researcher of "
        f"k8s/base allows it"
    )
    assert not api.objects


@pytest.mark.system
def test_missing_jobset_is_named(api: ApiServer, sh: Shell, path: str) -> None:
    api.groups.remove("jobset.x-k8s.io")
    said = sh.fail("submit", path)
    assert said.endswith(
        "the cluster does not have jobset.x-k8s.io/v1alpha2; install JobSet, or set "
        "cluster.jobset: false"
    )
    assert not api.objects
    sh("submit", path, *PLAIN)
    assert "tiny-trainer-0" in api.names("Job")
    assert "is deleted" in sh("cancel", path, *PLAIN)
    assert not api.objects


def test_missing_namespace_is_named(api: ApiServer, sh: Shell, path: str) -> None:
    said = sh.fail("submit", path, "--set", "cluster.namespace=research")
    assert said == (
        "namespace research does not exist; create it (kubectl apply -k k8s/base) or correct "
        "cluster.namespace"
    )


def test_store_that_only_the_cluster_reaches_is_no_obstacle(
    api: ApiServer, sh: Shell, path: str
) -> None:
    said = sh.warned("submit", path, "--set", "store.runs=s3://no-such-bucket/runs")
    assert (
        "cannot check whether the run is complete, or belongs to another configuration: s3://no-such"
        in said
    )
    assert api.names("JobSet") == ["tiny"]


@MODES
def test_cancel_lets_pods_save_and_touches_nothing_else(
    api: ApiServer, sh: Shell, path: str, mode: tuple[str, ...]
) -> None:
    sh("submit", path, *mode, "--set", "name=other")
    others = versions(api)
    sh("submit", path, *mode)
    trainers = api.pods("trainer")[-2:]
    for pod in trainers:
        api.run_pod(pod)
    with ending(api) as ended:
        said = sh("cancel", path, *mode)
    assert (
        f"waiting for 2 pods to save and exit (at most 600 s each): {', '.join(trainers)}" in said
    )
    assert ended == trainers
    assert versions(api) == others
    assert "dist-sae/tiny is not on the cluster: nothing to cancel" in sh("cancel", path, *mode)


def test_resume_goes_on_after_cancel(api: ApiServer, sh: Shell, path: str) -> None:
    sh("submit", path)
    said = sh.fail("resume", path)
    assert said == "dist-sae/tiny is still running; see dist-sae status"
    sh("cancel", path)
    assert not api.objects
    assert "dist-sae/tiny is submitted" in sh("resume", path)
    assert api.names("JobSet") == ["tiny"]


@MODES
def test_resume_replaces_a_run_that_failed(
    api: ApiServer, sh: Shell, path: str, mode: tuple[str, ...]
) -> None:
    sh("submit", path, *mode)
    kind, name = ("Job", "tiny-trainer-0") if mode else ("JobSet", "tiny")
    api.condition(kind, name, "Failed", "BackoffLimitExceeded")
    first = api.the(kind, name)["metadata"]["uid"]
    assert "it has failed (BackoffLimitExceeded); to continue: dist-sae resume" in sh(
        "submit", path, *mode
    )
    assert api.the(kind, name)["metadata"]["uid"] == first

    roomier = ("--set", "cluster.trainer.memory=20Gi")
    said = sh("resume", path, *mode, *roomier)
    assert "dist-sae/tiny has failed (BackoffLimitExceeded); deleting its objects" in said
    assert api.the(kind, name)["metadata"]["uid"] != first
    check_objects(api, path, *mode[1:], roomier[1])


def test_resume_waits_for_a_run_that_is_ending(api: ApiServer, sh: Shell, path: str) -> None:
    sh("submit", path)
    (pod, *_) = api.pods("trainer")
    api.run_pod(pod)
    with api.changed:
        api.begin_deletion(("jobsets", "tiny"))
    assert "dist-sae/tiny is being deleted; wait until it is gone" in sh.fail("submit", path)
    with ending(api) as ended:
        assert "dist-sae/tiny is submitted" in sh("resume", path)
    assert ended == [pod]
