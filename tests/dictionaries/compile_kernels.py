"""Compile the Triton kernels as calls would, without a GPU.

    TRITON_INTERPRET=0 python -m tests.dictionaries.compile_kernels 90 768,4096 float32

Prints a line of JSON for each kernel and configuration, with figures from `ptxas -v` and the PTX.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from dist_sae.kernels import Adam
from dist_sae.kernels import triton as kernels
from dist_sae.kernels.triton_update import WIDEST
from tests.dictionaries.products import N_LATENTS, make_entries

_SELECTIONS = ((1, 64), (32, 64), (200, 64), (1024, 64), (32, 1), (32, 37))
"""(Keys per row, products per row). If few latents are dead, products can be any number."""
_ROWS, _PER_ROW = 64, 16
_PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"


class Compiler:
    """Replacement for kernel launches. Compiles each kernel once, and stores the result."""

    def __init__(self) -> None:
        self.kernels: dict[str, Any] = {}
        self.tuned = 0
        self._arch = 0
        run = JITFunction.run

        def compile_only(jit: Any, *args: Any, **kwargs: Any) -> Any:
            kernel = run(jit, *args, **(kwargs | {"warmup": True}))
            names = ("UNIT_ROWS", "COLUMNS", "SLOTS", "num_warps", "maxnreg")
            config = {name: kwargs[name] for name in names if name in kwargs}
            self.kernels[f"{jit.__name__} {config} {kernel.hash}"] = (jit.__name__, config, kernel)
            return kernel

        JITFunction.run = compile_only
        triton.runtime.driver.set_active(
            SimpleNamespace(
                get_current_target=lambda: GPUTarget("cuda", self._arch, 32),
                get_current_device=lambda: self._arch,
                get_current_stream=lambda _device: 0,
                get_benchmarker=lambda: self._tune,
            )
        )

    def target(self, arch: int) -> None:
        """Compile for this architecture from now on."""
        self.kernels.clear()
        kernels.sum_segments_kernel.cache.clear()
        self._arch = arch

    def _tune(self, call: Any, quantiles: Any) -> list[float]:  # noqa: ARG002
        self.tuned += 1
        call()
        return [0.0]


def call_all(d_in: int, dtype: torch.dtype) -> None:
    """Call each kernel as a training step does."""
    entries = make_entries([[*range(_PER_ROW)]] * _ROWS, device=torch.device("cpu"))
    W, rows = torch.zeros(N_LATENTS, d_in, dtype=dtype), torch.zeros(_ROWS, d_in, dtype=dtype)
    values = torch.zeros(len(entries.latents), dtype=dtype)
    kernels.combine(values, entries, W)
    kernels.gather_dot(rows, entries, W)
    kernels.sum_by_latent(values, entries, rows, W, torch.zeros(N_LATENTS, dtype=dtype))
    for k, width in _SELECTIONS:
        best = torch.zeros(_ROWS, k, dtype=torch.int64)
        products, latents = torch.zeros(_ROWS, width, dtype=dtype), torch.arange(width)
        kernels.KERNELS.keep_largest(best, products, torch.zeros(width), latents)
    adam = Adam(1, 1e-4, 0.9, 0.999, 1e-9, torch.ones(()), torch.zeros(()))
    for width in (d_in, WIDEST):
        W, gradient, exp_avg, exp_avg_sq = torch.zeros(4, 2, width)
        for copy in (None, torch.zeros(2, width, dtype=torch.bfloat16)):
            for unit_rows in (False, True):
                kernels.KERNELS.update(
                    W, gradient, exp_avg, exp_avg_sq, adam, unit_rows=unit_rows, copy=copy
                )


def _check_tuned(compiler: Compiler, d_in: int) -> None:
    """Check that every configuration that a GPU could choose was compiled."""
    tuned = kernels.sum_segments_kernel
    wanted = kernels.prune_configs(tuned.configs, {"D": d_in})
    tried = [c for name, c, _ in compiler.kernels.values() if name == "sum_segments_kernel"]
    assert {(c.kwargs["COLUMNS"], c.num_warps) for c in wanted} == {
        (config["COLUMNS"], config["num_warps"]) for config in tried
    }


def resources(kernel: Any, arch: int) -> dict[str, int]:
    """Return a kernel's number of registers, spilled bytes, and 16-byte loads."""
    with tempfile.NamedTemporaryFile(suffix=".ptx") as ptx:
        ptx.write(kernel.asm["ptx"].encode())
        ptx.flush()
        name = f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"
        command = [str(_PTXAS), "-v", name, ptx.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilt = re.findall(r"(\d+) bytes spill", said)
    [registers] = re.findall(r"Used (\d+) registers", said)
    loads = [line for line in kernel.asm["ptx"].splitlines() if "ld.global" in line]
    wide = sum(".v4.b32" in line for line in loads)
    return {"registers": int(registers), "spilt": sum(map(int, spilt)), "wide_loads": wide}


def main(archs: str, widths: str, dtypes: str) -> None:
    compiler = Compiler()
    for arch in map(int, archs.split(",")):
        for d_in in map(int, widths.split(",")):
            for dtype in dtypes.split(","):
                compiler.target(arch)
                call_all(d_in, getattr(torch, dtype))
                _check_tuned(compiler, d_in)
                for name, config, kernel in compiler.kernels.values():
                    found = resources(kernel, arch)
                    about = {"kernel": name, "arch": arch, "d_in": d_in, "dtype": dtype}
                    sys.stdout.write(json.dumps(about | config | found) + "\n")
    # another number of rows, as routing gives in every step, must not tune again
    tuned = []
    for n in (_ROWS, _ROWS - 1, _ROWS // 2 + 1):
        entries = make_entries([[*range(_PER_ROW)]] * n, device=torch.device("cpu"))
        kernels.combine(torch.zeros(n * _PER_ROW), entries, torch.zeros(N_LATENTS, 24))
        tuned.append(compiler.tuned)
    sys.stdout.write(json.dumps({"tuned": tuned}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
