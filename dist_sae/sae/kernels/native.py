"""The sparse products on a CPU: the selection in C++, the rest as in `torch.py`.

`native.cpp` is compiled when it is first needed (g++ or clang++, two seconds) and kept in
`~/.cache/dist_sae`. It looks at every pre-activation once and keeps the largest in a small buffer:
about a sixth of the product's time, where torch's top-k over the same takes as long as the product.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dist_sae.sae.kernels import torch as plain

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = ("-O3", "-march=native", "-fopenmp")


def available() -> str | None:
    """None if the library is there or could be built, else why not."""
    try:
        _library()
    except OSError as exc:
        return str(exc)
    return None


def keep_largest(best: Tensor, products: Tensor, bias: Tensor, latents: Tensor) -> Tensor:
    """See `KeepLargest`."""
    functions = {torch.bfloat16: "keep_largest_bf16", torch.float32: "keep_largest_fp32"}
    if products.dtype not in functions:
        return plain.keep_largest(best, products, bias, latents)
    tensors = [t.contiguous() for t in (best.clone(), products, bias.float(), latents)]
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    sizes = [ctypes.c_int64(size) for size in (*products.shape, best.shape[1])]
    function = getattr(_library(), functions[products.dtype])
    function(*pointers, *sizes, ctypes.c_int(torch.get_num_threads()))
    return tensors[0]


KERNELS = plain.KERNELS._replace(name="native", keep_largest=keep_largest)


@cache
def _library() -> ctypes.CDLL:
    """The compiled functions.

    Raises:
        OSError: There is no compiler, or it failed.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("there is no C++ compiler (g++ or clang++)")
    # a home folder may be shared by machines with other processors
    made_from = (_SOURCE.read_bytes(), " ".join((compiler, *_FLAGS)).encode(), _processor())
    digest = hashlib.sha256(b"\0".join(made_from)).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "dist_sae"
    path = folder / f"native-{digest}.so"
    if not path.exists():
        logger.info("compiling the sparse products for this processor, once")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as made:  # several ranks may do so at once
            library = Path(made) / "native.so"
            command = [compiler, *_FLAGS, "-shared", "-fPIC", str(_SOURCE), "-o", str(library)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise OSError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")
            library.replace(path)
    return ctypes.CDLL(
        str(path)
    )  # its OpenMP is the one that torch has loaded: one pool of threads


def _processor() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return b""
    return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
