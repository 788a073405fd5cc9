"""Reading a trained dictionary while its run continues, or after damage."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dist_sae.checkpoint.layout import Checkpoint, Checkpoints
from dist_sae.checkpoint.trained import read_trained
from dist_sae.config import Run
from dist_sae.config.fingerprint import run_fingerprint
from dist_sae.errors import CorruptObjectError, ObjectNotFoundError
from dist_sae.storage import ObjectStore, open_store
from tests.checkpoint.test_state import advance, make_run, make_state
from tests.dictionaries.recipes import D_IN, N_LATENTS


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path, "topk")


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path))


def save(run: Run, store: ObjectStore, step: int, keep: int = 2) -> torch.Tensor:
    """Save a checkpoint of a dictionary at a step; return its decoder."""
    state = make_state(run, "topk")
    advance(state, range(step))
    checkpoints = Checkpoints(store, run.name, keep)
    scalars = {
        "scale": 2.0,
        "mean": [0.5] * D_IN,
        "variance": 1.0,
        "rows": 1,
        "run": run_fingerprint(run),
    }
    checkpoints.commit(
        step, [checkpoints.write(step, state._replace(average=None).pieces())], scalars
    )
    return state.sae.W_dec.detach()


def part(run: Run, store: ObjectStore, step: int) -> str:
    """Return the key of one of a checkpoint's objects."""
    keys = store.keys(f"{run.name}/checkpoints/step-{step:08d}/")
    return next(key for key in keys if "/W_dec" in key)


def damage(run: Run, store: ObjectStore, step: int) -> None:
    key = part(run, store, step)
    store.put(key, store.get(key)[:-1] + b"!")


def test_the_newest_is_read_whole(run: Run, store: ObjectStore) -> None:
    assert read_trained(store, run) is None
    save(run, store, 1)
    W_dec = save(run, store, 2)
    trained = read_trained(store, run)
    assert trained is not None
    assert (trained.step, trained.normalisers.by_site[run.site].scale) == (2, 2.0)
    assert torch.equal(trained.normalisers.mean, torch.full((D_IN,), 0.5, dtype=torch.float64))
    assert trained.idle_rows.shape == (N_LATENTS,)
    torch.testing.assert_close(trained.sae.W_dec.detach(), W_dec)


def test_a_damaged_one_is_passed_over_loudly(
    run: Run, store: ObjectStore, caplog: pytest.LogCaptureFixture
) -> None:
    save(run, store, 1)
    save(run, store, 2)
    damage(run, store, 2)
    trained = read_trained(store, run)
    assert trained is not None
    assert trained.step == 1
    assert [r.levelno for r in caplog.records] == [logging.ERROR]
    damage(run, store, 1)
    with pytest.raises(CorruptObjectError, match="W_dec"):
        read_trained(store, run)


def test_a_lost_part_is_damage_too(
    run: Run, store: ObjectStore, caplog: pytest.LogCaptureFixture
) -> None:
    save(run, store, 1)
    save(run, store, 2)
    store.delete(part(run, store, 2))
    trained = read_trained(store, run)
    assert trained is not None
    assert trained.step == 1
    assert [r.levelno for r in caplog.records] == [logging.ERROR]
    store.delete(part(run, store, 1))
    with pytest.raises(ObjectNotFoundError, match="W_dec"):
        read_trained(store, run)


def test_one_that_its_trainer_deletes_meanwhile_has_a_newer_one(
    run: Run,
    store: ObjectStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    save(run, store, 1)
    pieces, saved = Checkpoint.pieces, list[torch.Tensor]()

    def read_slowly(
        self: Checkpoint, name: str, start: int, stop: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        if name == "W_dec" and not saved:  # by now other tensors have been read
            with torch.enable_grad():  # the trainer would be another process
                saved.append(save(run, store, 2, keep=1))
        return pieces(self, name, start, stop)

    monkeypatch.setattr(Checkpoint, "pieces", read_slowly)
    trained = read_trained(store, run)
    assert trained is not None
    assert trained.step == 2
    torch.testing.assert_close(trained.sae.W_dec.detach(), saved[0])
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
