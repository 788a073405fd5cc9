"""CPU kernels: selections, sums by latent and updates in C++, the rest in torch.

`native.cpp` is compiled when it is first needed (g++ or clang++, two seconds) and cached in
`~/.cache/dist_sae`.

- Selections read every pre-activation once and keep the largest in a small buffer. That takes about
  a sixth of the product's time; torch's top-k takes as long as the product.
- Sums by latent are the gradients of the weights and as large as these. They are no faster than
  torch's, but are written to the memory of the last step's gradients, because page faults of fresh
  memory cost more than writing to it.
- Updates read and write a tensor once. torch's Adam, norm, division and copy do so four times.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dist_sae.kernels import torch as plain
from dist_sae.kernels.base import Adam, Entries, Kernels

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("native.cpp")
# -ffp-contract=off: fused multiply-adds would make results depend on the processor.
# -fno-math-errno: setting errno would slow down square roots.
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-ffp-contract=off", "-fno-math-errno")
_EXPECTED = 64  # initial guess: one of this many products exceeds its bound
_WEIGHTS = 2  # gradients whose memory is reused: W_enc's and W_dec's


def kernels() -> Kernels:
    """Create kernels for one dictionary, which reuse the memory of its gradients."""
    memory = GradientMemory()
    return plain.KERNELS._replace(
        name="native",
        keep_largest=keep_largest,
        above=above,
        sum_by_latent=partial(sum_by_latent, memory.empty),
        sum_values=sum_values,
        update=update,
        empty=memory.empty_like,
    )


def available() -> str | None:
    """Return why the library cannot be used, or None if it can."""
    try:
        _library()
    except OSError as exc:
        return str(exc)
    return None


def keep_largest(best: Tensor, products: Tensor, bias: Tensor, latents: Tensor) -> Tensor:
    """See `Kernels.keep_largest`."""
    functions = {torch.bfloat16: "keep_largest_bf16", torch.float32: "keep_largest_fp32"}
    if products.dtype not in functions:
        return plain.keep_largest(best, products, bias, latents)
    best = best.clone(memory_format=torch.contiguous_format)
    sizes = (*products.shape, best.shape[1])
    _call(functions[products.dtype], (best, products, bias.float(), latents), sizes)
    return best


def above(products: Tensor, bias: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `Kernels.above`."""
    functions = {torch.bfloat16: "above_bf16", torch.float32: "above_fp32"}
    if products.dtype not in functions:
        return plain.above(products, bias, bounds)
    count, found = torch.full((1,), products.numel() // _EXPECTED), -1
    while found < 0:  # try again with the exact count if there was too little room
        room = int(count)
        values, places = torch.empty(room), torch.empty(2, room, dtype=torch.int32)
        tensors = count, values, *places, products, bias.float(), bounds.float()
        _call(functions[products.dtype], tensors, (*products.shape, room))
        found = int(count) if int(count) <= room else -1
    rows, columns = places[:, :found].long()
    return values[:found].clone(), rows, columns


def sum_by_latent(
    empty: Callable[[int, int], Tensor],
    coefficients: Tensor,
    entries: Entries,
    rows: Tensor,
    W: Tensor | None = None,
    along: Tensor | None = None,
) -> Tensor:
    """See `Kernels.sum_by_latent`. `empty` allocates the fp32 tensor for the sums."""
    if rows.dtype != torch.float32:
        return plain.sum_by_latent(coefficients, entries, rows, W, along)
    given = (coefficients, W, along)
    assert all(tensor is None or tensor.dtype == rows.dtype for tensor in given)
    order, starts = entries.by_latent
    sums = empty(entries.n_latents, rows.shape[1])
    tensors = sums, coefficients[order], entries.rows[order], starts, rows, W, along
    _call("sum_by_latent_fp32", tensors, (len(sums), len(order), rows.shape[1]))
    return sums


def sum_values(coefficients: Tensor, entries: Entries) -> Tensor:
    """See `Kernels.sum_values`. Bitwise equal to torch's, without a sort: a CPU adds in order."""
    sums = coefficients.new_zeros(entries.n_latents, dtype=torch.float64)
    return sums.index_add_(0, entries.latents, coefficients.double()).to(coefficients.dtype)


def update(
    W: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    adam: Adam,
    *,
    unit_rows: bool = False,
    copy: Tensor | None = None,
) -> None:
    """See `Update`. Bitwise equal to torch's, if torch uses AVX2 or AVX-512."""
    if W.dtype != torch.float32 or (copy is not None and copy.dtype != torch.bfloat16):
        plain.update(W, gradient, exp_avg, exp_avg_sq, adam, unit_rows=unit_rows, copy=copy)
        return
    written = (W, exp_avg, exp_avg_sq, *([] if copy is None else [copy]))
    assert all(tensor.is_contiguous() for tensor in written)
    tensors = W, gradient, exp_avg, exp_avg_sq, copy, adam.scale, adam.found_inf
    sizes = (*W.shape, int(unit_rows)) if W.ndim > 1 else (1, len(W), 0)
    numbers = adam.step_size, adam.root, adam.beta1, adam.beta2, adam.eps
    _call("update_fp32", tensors, sizes, numbers)


class GradientMemory:
    """Allocator that reuses the memory of freed gradients."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, weakref.ref[Any]]] = []

    def empty_like(self, W: Tensor) -> Tensor:
        """See `Kernels.empty`."""
        is_kept = W.dtype == torch.float32 and W.device.type == "cpu"
        return self.empty(*W.shape) if is_kept else torch.empty_like(W)

    def empty(self, *shape: int) -> Float[Tensor, "n_latents d_in"]:
        """Allocate an fp32 tensor, in reused memory if a tensor of its shape was freed."""
        kept = (tensor for tensor, held in self._kept if held() is None)
        tensor = next((t for t in kept if t.shape == shape), None)
        if tensor is None:
            tensor = torch.empty(*shape)
        self._kept = [other for other in self._kept if other[0] is not tensor]
        array = tensor.numpy()  # alive as long as any tensor that shares its memory
        self._kept = [(tensor, weakref.ref(array)), *self._kept][:_WEIGHTS]
        return torch.from_numpy(array)


def _call(
    name: str,
    tensors: Sequence[Tensor | None],
    sizes: Sequence[int],
    numbers: Sequence[float] = (),
) -> None:
    """Call a C function. It must write to the first tensor, so that one may not be copied."""
    assert tensors[0] is not None
    assert tensors[0].is_contiguous()
    tensors = [tensor if tensor is None else tensor.contiguous() for tensor in tensors]
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
    given = [*map(ctypes.c_int64, sizes), *map(ctypes.c_double, numbers)]
    getattr(_library(), name)(*pointers, *given, ctypes.c_int(torch.get_num_threads()))


@cache
def _library() -> ctypes.CDLL:
    """Return the compiled functions. Compile them if they are not cached.

    Raises:
        OSError: There is no compiler, or compilation failed.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("no C++ compiler found (g++ or clang++)")
    # part of the name: a home folder may be shared by machines with different processors
    made_from = (_SOURCE.read_bytes(), " ".join((compiler, *_FLAGS)).encode(), _processor())
    digest = hashlib.sha256(b"\0".join(made_from)).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "dist_sae"
    path = folder / f"native-{digest}.so"
    if not path.exists():
        logger.info("compiling the sparse products for this CPU (once)")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as made:  # several ranks may compile at once
            library = Path(made) / "native.so"
            command = [compiler, *_FLAGS, "-shared", "-fPIC", str(_SOURCE), "-o", str(library)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise OSError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")
            library.replace(path)
    # uses the OpenMP that torch has loaded, so there is a single pool of threads
    return ctypes.CDLL(str(path))


def _processor() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return b""
    return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
