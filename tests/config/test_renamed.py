"""Run files, checkpoints and plans that were written before a key was renamed."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_sae.config import Run, load_run, renamed, validate_run
from dist_sae.config.fingerprint import changes, run_fingerprint
from dist_sae.data.identity import plan_settings, setting_changes
from dist_sae.errors import ConfigError
from tests.runs import write_run

TIMEOUTS = {"missing_seconds": 50, "lost_seconds": 4, "hung_seconds": 60}
OLD: dict[str, Any] = {
    "model": {"kind": "huggingface", "path": "m", "shards": 3},
    "corpus": {"kind": "files", "files": ["t.txt"]},
    "activations": {"sites": ["resid_post.1"]},
    "processes": {"trainers": 4, "shards": 2},
    "train": TIMEOUTS | {"save_beside": False},
}
NEW: dict[str, Any] = OLD | {
    "model": {"kind": "huggingface", "path": "m", "tensor_parallel": 3},
    "processes": {"trainers": 4, "latent_shards": 2},
    "train": {"save_in_background": False},
    "timeouts": TIMEOUTS,
}


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run file with old names, in a process that has not warned about any of them."""
    monkeypatch.setattr(renamed, "warned", set())
    (tmp_path / "old").mkdir()
    return write_run(tmp_path / "old", store={"activations": "/a", "runs": "/r"}, **OLD)


@pytest.fixture
def new(tmp_path: Path) -> Run:
    return load_run(write_run(tmp_path, store={"activations": "/a", "runs": "/r"}, **NEW))


def test_a_run_file_by_old_names_is_the_same_run_and_each_is_told_once(
    old: Path, new: Run, caplog: pytest.LogCaptureFixture
) -> None:
    assert new.tensor_parallel == 3
    assert (new.replicas, new.timeouts.lost_seconds) == (2, 4)
    for _ in range(2):
        assert load_run(old) == new
    assert sorted(record.getMessage() for record in caplog.records) == sorted(
        f"{old}: {key} was renamed to {name}" for key, name in renamed.RENAMED.items()
    )


def test_overrides_by_either_name_replace_either(old: Path, new: Run, tmp_path: Path) -> None:
    for path in (old, tmp_path / "run.yaml"):
        for keys in (renamed.RENAMED.keys(), renamed.RENAMED.values()):
            run = load_run(path, [f"{key}=1" for key in keys])
            assert (run.tensor_parallel, run.replicas, run.timeouts.hung_seconds) == (1, 4, 1)
    assert load_run(old, ["processes={shards: 1}"]).replicas == 1
    assert load_run(old).replicas == new.replicas


def test_an_override_is_told_by_its_new_name(new: Run, tmp_path: Path, caplog: Any) -> None:
    renamed.warned.clear()
    load_run(tmp_path / "run.yaml", ["train.lost_seconds=9"])
    expected = "--set train.lost_seconds=9: train.lost_seconds was renamed to timeouts.lost_seconds"
    assert [record.getMessage() for record in caplog.records] == [expected]


def test_a_key_by_both_names_is_refused(old: Path) -> None:
    data = yaml.safe_load(old.read_text())
    data["timeouts"] = {"lost_seconds": 1}
    data["model"]["tensor_parallel"] = 3
    both = [
        "model.shards: was renamed to model.tensor_parallel, which is also given",
        "train.lost_seconds: was renamed to timeouts.lost_seconds, which is also given",
    ]
    old.write_text(yaml.safe_dump(data))
    for read in (partial(load_run, old), partial(validate_run, data, str(old))):
        with pytest.raises(ConfigError) as told:
            read()
        lines = str(told.value).splitlines()
        assert [line.partition(";")[0] for line in lines] == [f"{old}: {line}" for line in both]


@pytest.mark.parametrize("section", [{"train": 5}, {"timeouts": 5}, {"processes": []}])
def test_sections_that_are_none_are_named(old: Path, section: dict[str, Any]) -> None:
    old.write_text(yaml.safe_dump(yaml.safe_load(old.read_text()) | section))
    with pytest.raises(ConfigError, match=f"{next(iter(section))}: must be a section"):
        load_run(old)


def test_checkpoints_and_plans_by_old_names_are_of_the_same_run(
    old: Path, new: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """No warning is logged, because no user typed these names."""
    stored = run_fingerprint(new)
    stored["model"]["shards"] = stored["model"].pop("tensor_parallel")
    assert changes(stored, new) == []
    stored["train"] |= OLD["train"]  # from before these keys were free to change
    assert changes(stored, new) == []
    assert validate_run(yaml.safe_load(old.read_text()), "ConfigMap") == new
    planned = plan_settings(new)
    assert "tensor_parallel" not in planned["model"]  # otherwise the plan's hash would change
    planned["model"] |= {"shards": 8, "batch_tokens": 1}
    assert setting_changes(planned, plan_settings(new)) == []
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
