"""Fixtures: a cluster that runs pods, an API server to submit to, a run, and a shell."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dist_sae.commands.cli import main
from tests.conftest import Bucket
from tests.kubernetes.apiserver import ApiServer
from tests.kubernetes.podrunner import Cluster
from tests.runs import TINY, write_run


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


class Shell:
    """Shell that runs `dist-sae` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str) -> str:
        """Run a command that must succeed, and return its output."""
        code = main(arguments)
        said = self._capsys.readouterr()
        assert code == 0, said.err
        return said.out

    def fail(self, *arguments: str) -> str:
        """Run a command that must fail, and return its error, which must be one line."""
        assert main(arguments) == 2
        said = self._capsys.readouterr()
        (line,) = (text for text in said.err.splitlines() if text.startswith("error: "))
        assert "Traceback" not in said.err
        return line.removeprefix("error: ")

    def warned(self, *arguments: str) -> str:
        """Run a command that must succeed with warnings, and return its log."""
        assert main(arguments) == 0
        return self._capsys.readouterr().err


@pytest.fixture
def sh(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    """The API server that the kubeconfig in the environment points to."""
    with ApiServer() as server:
        server.write_kubeconfig(tmp_path / "kubeconfig")
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        yield server


@pytest.fixture
def path(tmp_path: Path, bucket: Bucket) -> str:
    """Path of the run file of a run named tiny, with two producers and two trainers."""
    store = {name: f"s3://{bucket.name}/{name}" for name in ("activations", "runs")}
    file = write_run(
        tmp_path,
        TINY,
        store={**store, "s3": {"endpoint_url": bucket.endpoint_url}},
        processes={"producers": 2, "trainers": 2},
        cluster={"image": "example.org/dist-sae:1"},
    )
    return str(file)


@contextmanager
def ending(api: ApiServer) -> Iterator[list[str]]:
    """End deleted pods, one after each new watch of a client. Yields their names."""
    ended: list[str] = []
    over = threading.Event()

    def going() -> list[str]:
        pods = (obj for key, obj in api.objects.items() if key[0] == "pods")
        return [p["metadata"]["name"] for p in pods if "deletionTimestamp" in p["metadata"]]

    def next_to_go(watches: int) -> str | None:
        with api.changed:
            api.await_(lambda: over.is_set() or bool(going() and api.watches > watches))
            return None if over.is_set() else going()[0]

    def end() -> None:
        watches = api.watches
        while pod := next_to_go(watches):
            watches = api.watches
            ended.append(pod)
            api.end_pod(pod)

    thread = threading.Thread(target=end)
    thread.start()
    try:
        yield ended
    finally:
        with api.changed:
            over.set()
            api.changed.notify_all()
        thread.join()
