"""The lease that allows one trainer per run, even after a trainer was killed."""

import logging
import os
import subprocess
import threading
from pathlib import Path

import pytest

from dist_sae.checkpoint import lease
from dist_sae.checkpoint.lease import Holder, TrainerLease
from dist_sae.errors import RunTakenError
from dist_sae.storage import ObjectStore, open_store
from dist_sae.storage.records import read_record, seal

KEY = "run/trainer.json"


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path))


@pytest.fixture
def elsewhere() -> Holder:
    """A trainer on another machine."""
    return Holder(life="x", host="far", pid=7, machine="other", started="1", beat=0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.02)
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.02)


def hold(store: ObjectStore, stopping: threading.Event | None = None) -> TrainerLease:
    return TrainerLease(store, "run", stopping or threading.Event())


def test_the_second_trainer_of_a_run_is_refused_in_one_line(store: ObjectStore) -> None:
    with hold(store), pytest.raises(RunTakenError) as caught, hold(store):
        pass
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{store.url}/run: is already being trained by process ")
    assert caught.value.exit_code == 75
    with hold(store):
        assert store.size(KEY)
    assert store.size(KEY) is None


def test_a_trainer_that_was_killed_here_is_followed_at_once(store: ObjectStore) -> None:
    with hold(store):
        mine = read_record(Holder, store, KEY)
    with subprocess.Popen(["true"]) as process:
        pass
    store.put(KEY, seal(mine.model_copy(update={"pid": process.pid, "life": "killed"})))
    with hold(store):
        assert read_record(Holder, store, KEY).life not in ("killed", mine.life)
    # another process may have got its id by now, e.g. this process
    store.put(KEY, seal(mine.model_copy(update={"started": "0", "life": "killed"})))
    with hold(store):
        pass


def test_a_trainer_that_was_killed_and_is_not_reaped_is_dead(store: ObjectStore) -> None:
    with hold(store):
        mine = read_record(Holder, store, KEY)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        # start time, see proc(5)
        started = Path(f"/proc/{process.pid}/stat").read_text().split()[21]
        its = {"pid": process.pid, "started": started, "life": "killed"}
        store.put(KEY, seal(mine.model_copy(update=its)))
        with pytest.raises(RunTakenError), hold(store):
            pass
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # from here on it is a zombie
        with hold(store):
            pass


@pytest.mark.usefixtures("quick")
def test_a_trainer_elsewhere_that_renews_its_hold_is_alive(
    store: ObjectStore, elsewhere: Holder
) -> None:
    store.put(KEY, seal(elsewhere))
    over = threading.Event()

    def live() -> None:
        for beat in range(1, 10**9):
            if over.wait(0.01):
                return
            store.put(KEY, seal(elsewhere.model_copy(update={"beat": beat})))

    thread = threading.Thread(target=live)
    thread.start()
    with pytest.raises(RunTakenError, match="process 7 on far"), hold(store):
        pass
    over.set()
    thread.join()


@pytest.mark.usefixtures("quick")
def test_a_trainer_elsewhere_that_is_silent_is_followed(
    store: ObjectStore, elsewhere: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(KEY, seal(elsewhere))
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.1)
    with hold(store):
        assert read_record(Holder, store, KEY).life != "x"


@pytest.mark.usefixtures("quick")
def test_a_trainer_whose_run_was_taken_over_stops_and_leaves_it_to_the_other(
    store: ObjectStore, elsewhere: Holder, caplog: pytest.LogCaptureFixture
) -> None:
    stopping = threading.Event()
    with caplog.at_level(logging.ERROR), hold(store, stopping):
        for _ in range(600):  # a renewal in progress may overwrite the first write
            store.put(KEY, seal(elsewhere))
            if stopping.wait(0.05):
                break
        assert stopping.is_set()
    assert "process 7 on far" in caplog.text
    assert read_record(Holder, store, KEY) == elsewhere


@pytest.mark.usefixtures("quick")
def test_the_hold_is_renewed(store: ObjectStore) -> None:
    with hold(store):
        while read_record(Holder, store, KEY).beat < 2:
            pass
