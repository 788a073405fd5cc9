"""Settings that have no effect in this run."""

from pathlib import Path

import pytest

from dist_sae.config import load_run
from dist_sae.data.plan import Plan
from dist_sae.producing.planner import plan
from dist_sae.training.ineffective import ineffective_settings
from tests.runs import TINY, write_run

SOUND = [
    "sae.dead_after_rows=null",
    # 760 documents of 31 rows, as first positions are left out, train; 40 are held out
    "corpus.documents=800",
    "corpus.document_rows=32",
    "activations.unit_rows=512",
    "activations.window_units=2",
    "train.rows=9600",  # 75 steps
    "train.batch_rows=128",
    "train.save_every_steps=20",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    path = write_run(tmp_path_factory.mktemp("void"), TINY)
    return path, plan(load_run(path, SOUND))


def test_a_sound_run_is_told_nothing(made: tuple[Path, Plan]) -> None:
    path, plan_ = made
    assert ineffective_settings(load_run(path, SOUND), plan_) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["sae.dead_after_rows=9600"],
            "sae.dead_after_rows: 9,600 rows, and the run has only 9,600: no latent can be dead, "
            "so AuxK has no effect, and the dead share stays unknown; leave it out, or lower it",
        ),
        (
            ["sae.dead_after_rows=9600", "sae.auxk=0"],
            "sae.dead_after_rows: 9,600 rows, and the run has only 9,600: no latent can be dead, "
            "and",
        ),
        (["sae.auxk_coefficient=0"], "sae.auxk_coefficient: is 0, so sae.auxk (4) has no effect"),
        (["sae.k_start=8", "sae.k_anneal_share=0.01"], "sae.k_start: reaches k within 0.01"),
        (["train.warmup_steps=75"], "train.warmup_steps: 75, and the run has only 75 steps"),
        (["train.warmup_steps=61"], "train.warmup_steps: 61 of 75 steps overlap the decay"),
        (
            ["train.save_every_steps=76"],
            "train.save_every_steps: 76, and the run has only 75 steps",
        ),
        (
            ["train.keep_best=4", "train.heldout_rows=100"],
            "train.keep_best: 4 of 4 checkpoints: all are kept",
        ),
        (["train.keep_every_steps=30"], None),  # it saves at step 60
        (["train.keep_every_steps=7"], "train.keep_every_steps: 7: no save (every 20 steps) falls"),
        (["train.log_every_steps=76"], "train.log_every_steps: 76, and the run has only 75 steps"),
        (
            ["train.heldout_rows=2000"],
            "train.heldout_rows: 2,000, but only about 1,240 are held out",
        ),
        (["train.normaliser_rows=1_000_000"], "train.normaliser_rows: 1,000,000, but there will"),
        (["train.batch_rows=3200"], "train.batch_rows: 3,200 of the"),
        (["train.max_passes=2"], "train.max_passes: 2, but one pass has about 23,560 rows"),
        (["store.max_ahead_units=99"], "store.max_ahead_units: 99, but there are only"),
        (
            [
                "sae={kind: relu, n_latents: 32}",
                "train.parent.run=before",
            ],
            "sae.sparsity_warmup_share: 0.05: the penalty rises from 0 again",
        ),
        (
            [
                "sae={kind: jumprelu, n_latents: 32, target_l0: 4}",
                "train.parent.run=before",
            ],
            "sae.sparsity_warmup_share: 0.1: the target L0 starts at sae.initial_l0 again",
        ),
        # the counts continue from the parent
        (["sae.dead_after_rows=9600", "train.parent.run=before"], None),
    ],
)
def test_what_cannot_act_is_said_in_one_line(
    made: tuple[Path, Plan], settings: list[str], said: str | None
) -> None:
    path, plan_ = made
    lines = ineffective_settings(load_run(path, [*SOUND, *settings]), plan_)
    about = [line for line in lines if said is None or line.startswith(said.partition(":")[0])]
    assert len(about) == (said is not None), lines
    assert said is None or about[0].startswith(said)


def test_few_held_out_documents_are_remarked(
    made: tuple[Path, Plan], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """The planner logs the warning. Trainers and the report call the same function."""
    path = write_run(tmp_path, TINY)
    plan(load_run(path, [*SOUND, "activations.heldout_share=0.004"]))
    assert "activations.heldout_share: 3 documents (about 93 rows) are held out" in caplog.text
