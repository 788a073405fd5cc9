"""The answers to a pod's probes."""

import urllib.request
from contextlib import ExitStack
from types import SimpleNamespace
from urllib.error import HTTPError

import pytest

from dist_sae.telemetry import liveness
from dist_sae.telemetry.exporter import Telemetry
from dist_sae.telemetry.gather import GatheredTelemetry


def answer(port: int | None, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as page:
            return page.status, page.read().decode().strip()
    except HTTPError as exc:
        return exc.code, exc.read().decode().strip()


def test_a_process_is_ready_once_it_works_and_lives_until_it_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr(liveness, "time", SimpleNamespace(monotonic=lambda: now))
    with Telemetry("run", "produce", 0) as telemetry:
        assert answer(telemetry.port, "/livez") == (200, "ok")
        assert answer(telemetry.port, "/readyz") == (503, "has not started working")
        telemetry.liveness.busy(60)
        assert answer(telemetry.port, "/readyz") == (200, "ok")
        now += 59
        assert answer(telemetry.port, "/livez") == (200, "ok")
        now += 4
        assert answer(telemetry.port, "/livez") == (503, "hung: exceeded its time limit 3 s ago")
        telemetry.liveness.idle()  # the process returned from the work
        now += 10_000
        assert answer(telemetry.port, "/livez") == (200, "ok")


def test_a_pod_is_what_the_worst_of_its_ranks_is() -> None:
    with ExitStack() as other, Telemetry("run", "train", 0, 4) as first:
        second = other.enter_context(Telemetry("run", "train", 0, 5))
        ports = {4: first.port or 0, 5: second.port or 0}
        with GatheredTelemetry("run", "train", ports, 0) as pod:
            first.liveness.idle()
            assert answer(pod.port, "/readyz") == (503, "rank 5: has not started working")
            second.liveness.idle()
            assert answer(pod.port, "/readyz") == (200, "ok")
            second.liveness.busy(-1)
            assert answer(pod.port, "/livez")[1].startswith("rank 5: hung")
            other.close()
            assert answer(pod.port, "/livez") == (503, "rank 5: does not respond")
