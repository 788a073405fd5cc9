"""The cache of baseline results stored with an activation set."""

from functools import partial
from pathlib import Path

import pytest

from dist_sae.evaluation.cache import cached
from dist_sae.storage import open_store


def test_what_other_code_made_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path))
    made = [cached(store, "pca", {"rows": 3}, partial(dict, fvu=n)) for n in (1, 2)]
    monkeypatch.setattr("dist_sae.evaluation.cache.__version__", "another")
    made.append(cached(store, "pca", {"rows": 3}, partial(dict, fvu=3)))
    assert made == [{"fvu": 1}, {"fvu": 1}, {"fvu": 3}]
