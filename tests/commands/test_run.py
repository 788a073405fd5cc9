"""`dist-sae run`: the whole pipeline, started as a user starts it."""

import errno
import io
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.commands import pipeline
from dist_sae.commands.pipeline import Child, run_together
from dist_sae.config.data import S3Config
from dist_sae.data.shard import CLAIMS
from dist_sae.errors import ProcessFailedError
from dist_sae.storage import open_store
from dist_sae.training.progress import ProgressView
from tests.conftest import Bucket
from tests.forks import HANG_SECONDS
from tests.launch import run
from tests.runs import write_run

pytestmark = pytest.mark.system

TRAINERS = {"trainers": 2, "threads": 1}
BOTH = {"producers": 2, **TRAINERS}
Start = Callable[[Path], "subprocess.Popen[str]"]
LATER = CLAIMS.key(8)
"""The claim of a unit in a stream's second window.

A run cannot end while another producer holds the claim.
"""


@pytest.fixture
def start(preloaded: dict[str, Path]) -> Start:
    """A function that starts `dist-sae run`. Its children also start from preloaded modules."""
    return lambda path: _start(path, preloaded["dist-sae"])


def _start(path: Path, *program: str | Path) -> "subprocess.Popen[str]":
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*program, "run", str(path), "--json"], stdout=pipe, stderr=pipe, text=True
    )


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in tasks.read_text().split()]


def test_one_command_goes_from_nothing_to_a_report_and_continues_after_ctrl_c(
    tmp_path: Path, start: Start
) -> None:
    path = write_run(
        tmp_path,
        processes=BOTH,
        train={"rows": 16_000, "max_passes": 3, "log_every_steps": 1},
        index={"latent_shards": 2},
    )
    activations = open_store(str(tmp_path / "activations"))
    activations.put(LATER, b"{}")
    process = start(path)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("train ") and "fvu" in line:  # after a step has ended
            process.send_signal(signal.SIGINT)
            break
    _, err = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 75, err
    assert "stopped: everything is saved" in err
    assert "Traceback" not in err
    steps = Checkpoints(open_store(str(tmp_path / "runs")), "world", 2).steps()
    assert steps
    assert steps[-1] < 100
    refused = run("run", str(path), "--set", "sae.k=1", code=2)  # refused before any process starts
    place = tmp_path / "runs/world"
    assert refused.startswith(
        f"error: {place}: contains a run with other settings (sae.k: 3 -> 1); "
    )
    activations.delete(LATER)

    out, err = start(path).communicate(timeout=HANG_SECONDS)
    result = json.loads(out.splitlines()[-1])
    assert result["step"] == 100
    assert result["fvu"] < result["pca_fvu"]
    assert {"fvu", "l0", "dead_share", "rows", "export", "report"} <= result.keys()
    assert Path(result["report"]).stat().st_size > 10_000
    assert (Path(result["export"]) / "cfg.json").exists()
    logs = tmp_path / "runs/world/logs"
    assert "resuming at step" in (logs / "trainer-0.log").read_text()
    assert "\nindex ...\nindex " in err
    assert "\nmerge 100%  " in err
    assert (tmp_path / "runs/world/index/step-00000100/buckets/00000000.json").exists()
    assert (logs / "index-0-0.log").exists()

    (logs / "trainer-0.log").unlink()
    # nothing remains to plan, produce, train or index
    out, err = start(path).communicate(timeout=HANG_SECONDS)
    assert json.loads(out.splitlines()[-1]) == result, err
    assert not (logs / "trainer-0.log").exists()
    assert err == "evaluate ...\nexport ...\nreport ...\n"


def test_each_job_of_a_sweep_is_measured_and_one_that_diverges_is_named(
    tmp_path: Path, start: Start
) -> None:
    jobs: dict[str, Any] = {
        "good": {},
        "wild": {"train.lr": 1e37, "train.clip_norm": None},
    }
    settings = {"train": {"rows": 1600, "max_passes": 1}, "index": {"workers": 0}}
    path = write_run(tmp_path, sweep={"jobs": jobs}, **settings)
    _, err = start(path).communicate(timeout=HANG_SECONDS)
    (error,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert error.startswith("error: trainer-0: world-wild: ")
    runs = tmp_path / "runs"
    assert (runs / "world-good/report/report.html").exists()
    assert not (runs / "world-wild/evaluation.json").exists()
    compared = run("compare", str(runs / "world"), "--json")  # the sweep's folder
    assert [row["run"] for row in json.loads(compared.splitlines()[-1])["runs"]] == [
        "world-good",
        "world-wild",
    ]


def test_a_command_for_one_run_asks_which_job_of_a_sweep(tmp_path: Path) -> None:
    path = str(write_run(tmp_path, sweep={"over": {"sae.k": [2, 4]}}))
    assert f"{path}: is a sweep; name a job with --job: k2, k4" in run("latents", path, code=2)
    assert f"--job b: {path} has the jobs k2, k4" in run("evaluate", path, "--job", "b", code=2)
    alone = str(write_run(tmp_path))
    assert f"--job b: {alone} is not a sweep; leave --job out" in run(
        "plan", alone, "--job", "b", code=2
    )


NO_COMPILER = """
import sys

class Finder:
    @staticmethod
    def find_spec(name, *place):
        assert name != "torch._dynamo"

sys.meta_path.insert(0, Finder)
"""
"""A `sitecustomize` module that makes the import of torch's compiler fail."""


def test_the_whole_run_works_over_s3_without_an_index_and_torchs_compiler(
    tmp_path: Path, bucket: Bucket
) -> None:
    """`dist-sae run` works in a bucket. `tests/kubernetes/test_pods.py` covers an index in S3.

    Importing the compiler takes 1.4 s of CPU, and torch's own optimizers import it. Here the import
    fails, so no code path may need it.
    """
    (tmp_path / "sitecustomize.py").write_text(NO_COMPILER)
    url = f"s3://{bucket.name}/some/prefix"
    store: dict[str, Any] = {
        "activations": f"{url}/activations",
        "runs": f"{url}/runs",
        "s3": {"endpoint_url": bucket.endpoint_url},
        "retention": "delete_consumed",
    }
    train = {"rows": 4800, "max_passes": 1}
    path = write_run(tmp_path, store=store, processes=TRAINERS, train=train, index={"workers": 0})
    done = subprocess.run(
        [sys.executable, "-m", "dist_sae", "run", str(path), "--json"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"},
        cwd=tmp_path,  # its logs are written to the working directory
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["fvu"] < result["pca_fvu"]
    assert result["report"].startswith(url)
    keys = set(open_store(url, S3Config(**store["s3"])).keys())
    assert {"activations/plan.json", "activations/units/00000000.json"} <= keys
    assert {"runs/world/evaluation.json", "runs/world/export/cfg.json"} <= keys
    assert not [key for key in keys if key.startswith("runs/world/index/")]
    assert not [key for key in keys if "/claims/" in key]  # all claims were released
    shards = [key for key in keys if key.startswith("activations/shards/")]
    assert len(shards) == 1  # the held-out unit's shard
    assert "activations/consumers/world.json" in keys
    # a trainer that was killed after all work was done starts again, and needs no unit
    run("train", str(path), "--set", "processes.trainers=1")


@pytest.mark.parametrize(
    ("settings", "who", "what"),
    [
        ({"max_passes": 1}, "plan", "train.rows asks for"),
        # both trainers fail, and one of them is reported
        ({"lr": 1e38}, "trainer-", "the gradient's norm is"),
    ],
)
def test_a_failing_process_ends_the_run_with_its_own_error(
    tmp_path: Path, start: Start, settings: dict[str, Any], who: str, what: str
) -> None:
    process = start(write_run(tmp_path, processes=BOTH, train=settings))
    _, err = process.communicate(timeout=HANG_SECONDS)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2, err
    assert len(errors) == 1
    assert "Traceback" not in err
    assert errors[0].startswith(f"error: {who}")
    assert what in errors[0]


@pytest.mark.parametrize(
    ("last_words", "code", "message"),
    [
        ("sys.exit('error: the store is full')", 1, "culprit: the store is full"),
        ("raise RuntimeError('a bug')", 1, "culprit: RuntimeError: a bug"),
        ("os.kill(os.getpid(), 9)", 75, "culprit: killed by SIGKILL (out of memory?)"),
        (
            "sys.stderr.write('error: another trains it'); sys.exit(75)",
            75,
            "culprit: another trains it",
        ),
    ],
)
@pytest.mark.parametrize("with_others", [True, False])
def test_the_one_that_failed_first_is_blamed(
    tmp_path: Path,
    last_words: str,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    *,
    with_others: bool,
) -> None:
    """The error names the process that failed first, not the other one, which ignores SIGTERM and
    is killed by the supervisor.
    """
    for grace in ("GRACE_SECONDS", "FAILED_GRACE_SECONDS"):
        monkeypatch.setattr(pipeline, grace, 0.5)
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('{}', flush=True); "
    view = ProgressView()
    children = [
        Child(
            "deaf", [sys.executable, "-c", deaf + "time.sleep(100)"], {}, tmp_path / "1.log", view
        ),
        Child(
            "culprit",
            [sys.executable, "-c", f"import os, sys; {last_words}"],
            {},
            Path("/dev/full"),
            view,
        ),
    ]
    with pytest.raises(ProcessFailedError) as caught:
        run_together(children[not with_others :], threading.Event(), view)
    assert str(caught.value).startswith(message)
    assert caught.value.exit_code == code


WARNS = (
    "import logging; from dist_sae import logs; logs.configure(rank=1); "
    "log = logging.getLogger('dist_sae.x').log; log(30, 'it is slow'); log(20, 'a detail'); "
    "logging.getLogger('somebody.else').warning('nothing of ours'); log(40, 'it is lost'); "
)


def test_what_children_warn_of_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    view = ProgressView()
    children = [
        Child(name, [sys.executable, "-c", WARNS], {}, tmp_path / f"{name}.log", view)
        for name in ("trainer-0", "trainer-1")
    ]
    run_together(children, threading.Event(), view)
    assert capsys.readouterr().err == "warning: it is slow\nerror: it is lost\n"


class Full(io.StringIO):
    """A file on a full disk."""

    def write(self, _: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_children_are_heard_when_nothing_can_be_shown(tmp_path: Path) -> None:
    """Children's output is read even if the console is full.

    Otherwise they would block once the pipe fills.
    """
    words = WARNS + 'print(\'{"role": "train", "done": 1, "total": 2}\', flush=True); '
    words += "[log(30, 'x' * 1000) for _ in range(300)]; print('{\"all\": 1}')"
    console = Console(file=Full())
    view = ProgressView(console)
    names = ("trainer-0", "trainer-1")
    logs = [tmp_path / f"{name}.log" for name in names]
    command = [sys.executable, "-c", words]
    children = [Child(n, command, {}, log, view) for n, log in zip(names, logs, strict=True)]
    run_together(children, threading.Event(), view)
    assert [len(log.read_text().splitlines()) for log in logs] == [303, 303]
    assert [child.result for child in children] == [{"all": 1}] * 2


def test_children_stop_when_the_parent_is_killed(tmp_path: Path) -> None:
    path = write_run(tmp_path, processes={"threads": 1}, train={"rows": 16_000, "max_passes": 3})
    open_store(str(tmp_path / "activations")).put(LATER, b"{}")
    process = _start(path, sys.executable, "-m", "dist_sae")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("train ") and "fvu" in line:  # after a step has ended
            break
    orphans = [os.pidfd_open(child) for child in children(process.pid)]
    assert orphans
    process.kill()
    process.communicate()
    for orphan in orphans:  # a pidfd is readable once its process has ended
        ready, _, _ = select.select([orphan], [], [], HANG_SECONDS)
        assert ready
        os.close(orphan)
