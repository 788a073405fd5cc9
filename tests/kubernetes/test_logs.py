"""Logs of pods by part, index and name, while the pods run and after they were replaced."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from dist_sae.commands.cli import main
from tests.kubernetes.apiserver import ApiServer, Object
from tests.kubernetes.conftest import Shell
from tests.kubernetes.containers import render_status


@contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Run `act` on the cluster in a thread while a command runs."""
    thread = threading.Thread(target=act)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def await_followers(api: ApiServer, number: int) -> None:
    api.await_(lambda: api.followers >= number)


def await_watch(api: ApiServer, before: int) -> None:
    api.await_(lambda: api.watches > before)


@pytest.fixture
def trainers(api: ApiServer, sh: Shell, path: str) -> tuple[str, str]:
    """The names of two running trainer pods with interleaved logs."""
    sh("submit", path)
    first, second = api.pods("trainer")
    for second_of_day, pod in ((1, first), (2, second), (3, first), (4, second)):
        api.run_pod(pod)
        api.say(pod, second_of_day, f"step {second_of_day}")
    return first, second


def test_logs_are_of_the_first_trainer(sh: Shell, path: str, trainers: tuple[str, str]) -> None:
    assert sh("logs", path).splitlines() == ["step 1", "step 3"]
    assert sh("logs", path, "--tail", "1").splitlines() == ["step 3"]
    assert sh("logs", path, "trainer-1").splitlines() == ["step 2", "step 4"]
    assert json.loads(sh("logs", path, "--tail", "1", "--json")) == {"line": "step 3"}


def test_logs_of_a_part_are_in_the_order_of_their_times(
    sh: Shell, path: str, trainers: tuple[str, str]
) -> None:
    first, second = trainers
    assert sh("logs", path, "trainer").splitlines() == [
        f"{first}: step 1",
        f"{second}: step 2",
        f"{first}: step 3",
        f"{second}: step 4",
    ]


def test_pod_that_has_not_begun_keeps_nobody_from_reading_the_others(
    api: ApiServer, sh: Shell, path: str, trainers: tuple[str, str]
) -> None:
    first, second = trainers
    third = api.fail_pod(first)
    waits, *lines = sh("logs", path, "trainer").splitlines()
    assert waits.startswith(f"{third}: (")
    assert waits.endswith("is waiting to start)")
    assert lines == [f"{second}: step 2", f"{second}: step 4"]


def test_logs_of_a_replaced_pod_are_found(
    api: ApiServer, sh: Shell, path: str, trainers: tuple[str, str]
) -> None:
    first, _ = trainers
    assert sh.fail("logs", path, "--previous") == (
        "dist-sae/tiny: there is no earlier pod trainer-0; dist-sae status lists the pods"
    )
    third = api.fail_pod(first)
    api.run_pod(third)
    api.say(third, 9, "resuming")
    assert sh("logs", path).splitlines() == ["resuming"]
    for which in (["--previous"], [first], ["trainer", "--previous"]):
        assert sh("logs", path, *which).splitlines() == ["step 1", "step 3"]


def test_logs_of_the_reporter_are_of_all_its_programs(api: ApiServer, sh: Shell, path: str) -> None:
    sh("submit", path)
    (pod,) = api.pods("reporter")
    api.run_pod(pod)
    api.say(pod, 1, "done")
    assert sh("logs", path, "reporter").splitlines() == ["done"] * 3  # evaluate, export, report


@pytest.fixture
def reporter(api: ApiServer, sh: Shell, path: str) -> Object:
    """A reporter's pod whose first container runs and has logged."""
    sh("submit", path)
    pod = api.the("Pod", api.pods("reporter")[0])
    api.set("Pod", pod["metadata"]["name"], status=render_status(pod, 0))
    api.say(f"{pod['metadata']['name']}/evaluate", 1, "FVU")
    return pod


def test_logs_of_programs_that_have_not_begun_are_left_out(
    sh: Shell, path: str, reporter: Object
) -> None:
    assert sh("logs", path, "reporter").splitlines() == ["FVU"]


def test_following_waits_for_the_next_program(
    api: ApiServer, sh: Shell, path: str, reporter: Object
) -> None:
    pod = reporter["metadata"]["name"]

    def go_on() -> None:
        for n_ended, program in ((1, "export"), (2, "main")):
            with api.changed:
                await_followers(api, n_ended)
                watches = api.watches
                api.set("Pod", pod, status=render_status(reporter, n_ended, runs=False))
                await_watch(api, watches)
                api.say(f"{pod}/{program}", 1 + n_ended, program)
                api.set("Pod", pod, status=render_status(reporter, n_ended))
        await_followers(api, 3)
        api.set("Pod", pod, status={"phase": "Succeeded"})

    with meanwhile(go_on):
        said = sh("logs", path, "reporter", "--follow")
    assert said.splitlines() == ["FVU", "export", "main"]


def test_following_does_not_wait_for_what_will_never_begin(
    api: ApiServer, sh: Shell, path: str, reporter: Object
) -> None:
    pod = reporter["metadata"]["name"]

    def fail() -> None:
        with api.changed:
            await_followers(api, 1)
            watches = api.watches
            waits = render_status(reporter, 1, runs=False)
            api.set("Pod", pod, status=waits)
            await_watch(api, watches)
            api.set("Pod", pod, status=waits | {"phase": "Failed"})

    with meanwhile(fail):
        assert sh("logs", path, "reporter", "--follow").splitlines() == ["FVU"]


def test_following_waits_for_pods_to_begin(
    api: ApiServer, sh: Shell, path: str, trainers: tuple[str, str]
) -> None:
    first, second = trainers
    third = api.fail_pod(first)

    def schedule(whether: str) -> None:
        conditions = [{"type": "PodScheduled", "status": whether}]
        api.set("Pod", third, status={"phase": "Pending", "conditions": conditions})

    schedule("False")
    assert f"pod {third} has no node yet; dist-sae status shows why" in sh.fail("logs", path)

    before = api.watches

    def begin() -> None:
        with api.changed:
            await_watch(api, before)
            watches = api.watches
            schedule("True")
            await_watch(api, watches)
            api.run_pod(third)
        api.say(third, 9, "resuming")
        await_followers(api, 2)
        api.end_pod(third)
        api.end_pod(second)

    with meanwhile(begin):
        said = sh("logs", path, "trainer", "--follow")
    assert f"{third}: resuming" in said.splitlines()
    assert f"{second}: step 4" in said.splitlines()


def test_logs_of_what_is_not_there_or_has_not_begun(api: ApiServer, sh: Shell, path: str) -> None:
    assert "dist-sae/tiny: there is no pod trainer-0" in sh.fail("logs", path)
    sh("submit", path)
    assert "is waiting to start" in sh.fail("logs", path)
    assert "there is no pod trainer-7" in sh.fail("logs", path, "trainer-7")


@pytest.mark.parametrize("which", ["trainer-0", "trainer"])
def test_following_goes_on_until_the_pods_end(
    api: ApiServer,
    path: str,
    trainers: tuple[str, str],
    capsys: pytest.CaptureFixture[str],
    which: str,
) -> None:
    first, second = trainers
    prefix = f"{first}: " if which == "trainer" else ""

    def speak_and_end() -> None:
        await_followers(api, 2 if which == "trainer" else 1)
        api.say(first, 5, "the end")
        for pod in trainers:
            api.fail_pod(pod)

    with meanwhile(speak_and_end):
        assert main(["logs", path, which, "--follow", "--tail", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith(prefix)] == [
        f"{prefix}step 3",
        f"{prefix}the end",
    ]
    if which == "trainer":
        assert f"{second}: step 4" in lines
