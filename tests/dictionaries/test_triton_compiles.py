"""The Triton kernels in the compiler, which is stricter than the interpreter and needs no GPU.

By default this covers Hopper and one width. With `--long` it covers all widths, dtypes and an older
architecture.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("Triton requires Linux", allow_module_level=True)

_NAMES = {
    "gather_dot_kernel",
    "keep_largest_kernel",
    "sum_chunks_kernel",
    "sum_segments_kernel",
    "update_kernel",
}
_OLDER, _HOPPER = 80, 90
_UNALIGNED = 1001


@pytest.fixture(scope="module")
def said(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    which = (
        (f"{_OLDER},{_HOPPER}", f"768,2048,4096,{_UNALIGNED}", "float32,bfloat16")
        if request.config.getoption("--long")
        else (str(_HOPPER), "4096", "float32")
    )
    cache = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-W", "error", "-m", "tests.dictionaries.compile_kernels", *which]
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, env=environment, cwd=root, stdout=subprocess.PIPE, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.system
def test_every_configuration_compiles_without_spills(said: list[dict[str, Any]]) -> None:
    found = said[:-1]
    assert {kernel["kernel"] for kernel in found} == _NAMES
    assert [kernel for kernel in found if kernel["spilt"]] == []
    # each thread has at least four columns of a block: 16 bytes of fp32, 8 of bf16
    wide = [k for k in found if k["d_in"] != _UNALIGNED and k["dtype"] == "float32"]
    assert [k for k in wide if "SLOTS" not in k and not k["wide_loads"]] == []
    # selections too, except where rows of products are not all aligned to 16 bytes
    selections = [k for k in wide if "SLOTS" in k]
    assert {k["SLOTS"] for k in selections if k["wide_loads"]} == {k["SLOTS"] for k in selections}


def test_other_numbers_of_rows_are_not_tuned_again(said: list[dict[str, Any]]) -> None:
    """A new number of rows does not trigger autotuning again.

    In a routed dictionary with several shards the number differs at each step.
    """
    first, *others = said[-1]["tuned"]
    assert first > 0
    assert others == [first, first]
