"""A run that continues from another one (`train.parent`) under its own name."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dist_sae.checkpoint import warm_start
from dist_sae.checkpoint.layout import Checkpoint, Checkpoints
from dist_sae.checkpoint.lineage import Ancestor, Lineage
from dist_sae.config import load_run
from dist_sae.data.plan import Plan, load_plan
from dist_sae.errors import DataExhaustedError, DistSaeError, PlanMismatchError
from dist_sae.kubernetes.stored import StoredRun
from dist_sae.producing.planner import plan_and_forecast
from dist_sae.storage import open_store
from dist_sae.training.completed import completed_result
from dist_sae.training.start import Start
from dist_sae.training.waiting import await_end
from tests.launch import run, train
from tests.training.trained import check_same, run_file

CONSTANT = {"decay_share": 0.0, "save_every_steps": 10}
HALF = ("--set", "train.rows=4800")
SAE = {"init": "random"}


def last(folder: Path, name: str) -> Checkpoint:
    checkpoint = Checkpoints(open_store(str(folder / "runs")), name, 9).latest()
    assert checkpoint is not None
    return checkpoint


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory, activations: str) -> Path:
    """A finished run of 4,800 rows at a constant learning rate, with a running mean."""
    folder = tmp_path_factory.mktemp("half")
    train(run_file(folder, activations, sae=SAE, train=CONSTANT | {"ema_decay": 0.9}), *HALF)
    return folder


@pytest.mark.system
def test_two_halves_are_the_whole_run_to_the_last_bit(
    tmp_path: Path, activations: str, half: Path
) -> None:
    """The second 4,800 rows continue past the end of the first pass.

    They are stopped and resumed once.
    """
    path = run_file(half, activations, sae=SAE, train=CONSTANT | {"ema_decay": 0.9})
    whole = run_file(tmp_path, activations, sae=SAE, train=CONSTANT | {"ema_decay": 0.9})
    child = ("--from", "world", "--set", "name=child", *HALF)
    train(path, *child, stop_at=13)
    train(path, *child)
    train(whole)
    check_same(last(half, "child"), last(tmp_path, "world"))
    lineage = Lineage.from_scalars(last(half, "child").scalars)
    assert lineage == Lineage((Ancestor("world", 30, 4800, state=True),), 30, 4800, 1200)
    assert lineage.totals(4800) == {"rows": 4800, "rows_with_parents": 9600}


def test_a_grandchild_goes_on_with_weights_alone_and_another_rate(
    activations: str, half: Path
) -> None:
    """The grandchild starts from the parent's running mean, with data from the beginning and a new
    Adam state.
    """
    path = run_file(half, activations, sae=SAE, train=CONSTANT)
    parent = "train.parent={run: world, step: 20, state: false, data: restart}"
    train(path, "--set", parent, "--set", "name=rate", "--set", "train.rows=320")
    train(path, "--from", "rate", "--set", "name=third", "--set", "train.rows=160")
    found = Lineage.from_scalars(last(half, "third").scalars)
    assert found == Lineage(
        (Ancestor("world", 20, 3200, state=False), Ancestor("rate", 2, 320, state=True)),
        2,
        320,
        80,
    )
    assert found.describe() == (
        "world to step 20 (3,200 rows; without Adam's state), "
        "rate to step 2 (320 rows; with Adam's state)"
    )
    mean, first = last(half, "world").scalars["mean"], last(half, "rate").scalars["mean"]
    assert mean == first


def test_all_rows_of_a_child_are_those_that_its_parent_left(activations: str, half: Path) -> None:
    """Training, the wait for the run's end and a cluster's status all compute the same number of
    steps.
    """
    path = run_file(half, activations, sae=SAE, train=CONSTANT | {"max_passes": 1})
    settings = ("name=rest", "train.rows=all", "train.parent={run: world}")
    run_, plan_ = load_run(path, settings), load_plan(open_store(activations), load_run(path))
    steps = (plan_.pass_rows - 4800) // 160
    forecasts = [plan_and_forecast(run_)[1]]
    for _ in range(2):  # the second one finds the run trained
        train(path, *(word for setting in settings for word in ("--set", setting)))
        forecasts.append(plan_and_forecast(run_)[1])
    for told in forecasts:
        assert (told["taken_rows"], told["run_rows"]) == (4800, 160 * steps)
        assert told["passes"] == round(160 * steps / plan_.pass_rows, 3)
    assert last(half, "rest").step == StoredRun(run_).steps == steps
    await_end(run_, threading.Event())
    done = {"step": steps, "rows": 160 * steps, "rows_with_parents": 4800 + 160 * steps}
    assert completed_result(run_) == done
    gone = load_run(path, [*settings, "store.activations=gone", "model.n_features=49"])
    assert completed_result(gone) == done
    for other in ("sae.k=2", "train.max_passes=2"):
        with pytest.raises(PlanMismatchError, match="contains a run with other settings"):
            completed_result(load_run(path, [*settings, other]))
    with pytest.raises(
        DataExhaustedError, match=r"all: the run's parents took .* less than one batch is left"
    ):
        plan_.resolve(run_, plan_.pass_rows // 4)


def go_on(path: Path, settings: Sequence[str], plan: Plan) -> None:
    """Do what a run does before it reads any data."""
    other = load_run(path, settings)
    read = "another" if other.activations.seed else plan.hash
    warm_start.find(open_store(other.store.runs), other, read)
    Start.from_parent(open_store(other.store.runs), other, plan).check(other, plan)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train.parent.run": "gone"}, "train.parent.run: {runs}/gone has no checkpoint"),
        (
            {"train.parent.step": 7},
            "train.parent.step: {runs}/world has no checkpoint of step 7; available steps: 20, 30",
        ),
        (
            {"name": "world"},
            "train.parent.run: world is this run itself; give this run another name",
        ),
        (
            {"sae.n_latents": 32},
            "sae.n_latents: 32 is less than the 64 latents of the initial dictionary",
        ),
        (
            {"sae.n_latents": 128},
            "train.parent.state: {runs}/world has 64 latents, not 128, so only its weights can "
            "be loaded; set this to false",
        ),
        ({"sae.kind": "batchtopk"}, "sae.kind: batchtopk cannot start from the weights of topk"),
        (
            {"activations.seed": 1},
            "train.parent.data: {runs}/world was trained on a different activation set than",
        ),
        (
            {"train.rows": 9600, "train.max_passes": 1},
            "train.rows asks for 9600 rows after the 4800 that the run's parents took",
        ),
    ],
)
def test_what_cannot_be_gone_on_from_is_one_line(
    activations: str, half: Path, settings: dict[str, Any], said: str
) -> None:
    path = run_file(half, activations, sae=SAE, train=CONSTANT)
    settings = {"name": "other", "train.parent.run": "world", "train.rows": 160} | settings
    plan_ = load_plan(open_store(activations), load_run(path))
    with pytest.raises(DistSaeError) as caught:
        go_on(path, [f"{key}={value}" for key, value in settings.items()], plan_)
    (line,) = str(caught.value).splitlines()
    assert said.format(runs=half / "runs") in line
    assert caught.value.exit_code == 2


def test_a_longer_run_of_the_same_name_is_told_how_to_go_on(activations: str, half: Path) -> None:
    path = run_file(half, activations, sae=SAE, train=CONSTANT | {"ema_decay": 0.9})
    error = run("train", str(path), code=2)
    assert "train.rows: 4800 -> 9600" in error
    assert "`--set name=OTHER --from world` continues from this run" in error
