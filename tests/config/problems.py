"""Error messages about a run file."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from dist_sae.config import load_run
from dist_sae.errors import ConfigError


def problems(path: Path, overrides: Sequence[str] = ()) -> list[str]:
    """Return the lines of `load_run`'s message, without the leading file name."""
    with pytest.raises(ConfigError) as caught:
        load_run(path, overrides)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]
