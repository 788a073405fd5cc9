"""Tests use only public names of the package."""

import re
from pathlib import Path

import pytest

IMPORT = r"from dist_sae[\w.]* import (\([^)]*|[^(\n]*)\b_[a-zA-Z]\w*"
STRING = r"""attr\([^"']*["']([\w.]*\.)?_[a-zA-Z]\w*["']"""


@pytest.mark.parametrize("use", [IMPORT, STRING], ids=["import", "string"])
def test_no_test_uses_a_private_name(use: str) -> None:
    """Private attributes are found by ruff (SLF001)."""
    for path in Path(__file__).parent.rglob("*.py"):
        assert not (found := re.search(use, path.read_text())), f"{path}: {found[0]}"
