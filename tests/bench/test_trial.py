"""The short run from which `dist-sae estimate --measure` takes its rates."""

import json
from pathlib import Path

import pytest

from dist_sae.bench.trial import step_and_total_seconds, trial_run
from dist_sae.commands.cli import main
from dist_sae.config import jobs_of
from dist_sae.planning.sizes import find_sizes
from tests.commands.test_cli import fail
from tests.runs import TINY, make_run, write_run


def record(step: int, seconds: float) -> dict[str, object]:
    return {"step": step, "phases": {"forward": seconds, "wait": 7.0, "others": 7.0}}


def test_steps_count_as_much_as_in_the_run() -> None:
    """Steps before and after latents can be dead are weighted as in the whole run.

    Steps take 1 s until latents can be dead, for a tenth of the run, and 3 s afterwards. A quarter
    of the trial is before this point. The first record, of 9 s, is skipped. So a step of the run
    takes .1 + 2.7 s.
    """
    records = [record(2, 9.0), record(4, 2.0), *(record(step, 6.0) for step in (6, 8, 10, 12))]
    records += [{"step": 12, "heldout_fvu": 0.1}, record(14, 6.0), record(16, 6.0)]
    step, all_steps = step_and_total_seconds(records, 0.1)
    assert step == pytest.approx(0.1 * 1 + 0.9 * 3)
    assert all_steps == pytest.approx((2 + 6 * 6) * 16 / 14)
    assert step_and_total_seconds(records, 1.0)[0] == pytest.approx((2 + 6 * 6) / 14)


def test_every_job_of_a_sweep_is_shortened(tmp_path: Path) -> None:
    """Each job is shortened, and keeps its share of `dead_after_rows`, but at least a quarter.

    One job's share is .6, which is kept.
    """
    sweep = {"over": {"sae.dead_after_rows": [2458, 100]}, "jobs": {"a": {"train.warmup_steps": 8}}}
    run = make_run(tmp_path, TINY, sweep=sweep)
    short = trial_run(run, [find_sizes(run)], 16, str(tmp_path / "trial"))
    found = [
        (job.train.rows, job.dead_after_rows, job.train.warmup_steps) for job in jobs_of(short)
    ]
    assert found == [(4096, 2458, 8), (4096, 1024, 8)]
    half = trial_run(run, [find_sizes(run)], 8, str(tmp_path / "trial"))
    assert [job.train.warmup_steps for job in jobs_of(half)] == [4, 4]
    assert [job.name for job in jobs_of(half)] == [job.name for job in jobs_of(run)]


@pytest.mark.system
def test_a_run_is_measured_by_a_short_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path, TINY)
    assert main(["estimate", str(path), "--measure", "16", "--json"]) == 0
    pace = json.loads(capsys.readouterr().out)["pace"]
    assert pace["training_seconds"] > pace["step_seconds"] > 0
    assert pace["total_seconds"] > pace["begin_and_end_seconds"] > 0.5
    assert pace["producers_rows_per_second"] > 0
    assert [each.name for each in tmp_path.iterdir()] == ["run.yaml"]


def test_what_cannot_be_measured_here_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path, TINY, train={"batch_rows": 4096}, processes={"trainers": 4096})
    said = fail(capsys, "estimate", str(path), "--measure")
    assert "--measure: 4096 ranks need 4096 cores, and" in said
    said = fail(capsys, "estimate", str(write_run(tmp_path, TINY)), "--measure", "3")
    assert "--measure: 3 steps are too few; give 16 or more" in said
