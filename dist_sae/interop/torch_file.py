"""Files in the format of `torch.save`: a dict of contiguous tensors by name, written in pieces.

The file is an uncompressed zip archive. `data.pkl` is a pickle (protocol 2) in which each tensor is
`torch._utils._rebuild_tensor_v2` of a storage, and `data/<n>` contains the bytes of storage n.
Reading such a file can run any code that its pickle names, unless the reader restricts the names,
as `torch.load(weights_only=True)` does.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from dist_sae.checkpoint.piecewise import PIECE_BYTES, PiecewiseTensor

_STORAGES = {torch.float32: torch.FloatStorage, torch.int32: torch.IntStorage}
_DATE = (1980, 1, 1, 0, 0, 0)  # fixed, so that equal content gives equal bytes


def torch_file_pieces(tensors: Iterable[PiecewiseTensor]) -> Iterator[bytes]:
    """Yield the bytes of a file that `torch.load` reads, in pieces.

    Args:
        tensors: Tensors with distinct names, in fp32 or int32.
    """
    ordered = list(tensors)
    out = _WriteBuffer()
    with zipfile.ZipFile(out, "w") as archive:

        def record(name: str, content: Iterable[bytes]) -> Iterator[bytes]:
            entry = zipfile.ZipInfo(f"archive/{name}", _DATE)
            with archive.open(entry, "w", force_zip64=True) as file:
                for data in content:
                    file.write(data)
                    yield from out.drain()

        yield from record("data.pkl", [_pickled(ordered)])
        yield from record("byteorder", [b"little"])
        for number, tensor in enumerate(ordered):
            yield from record(f"data/{number}", _bytes(tensor))
        yield from record("version", [b"3\n"])
    yield from out.drain()


def read_torch_file(file: Path) -> dict[str, Tensor]:
    """Read tensors by name without running code from the file, by rejecting all other content.

    Raises:
        ValueError: The file contains something other than tensors, or is damaged.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as exc:
        reason = str(exc).strip().splitlines()
        raise ValueError(
            f"{file.name} contains more than tensors, or is damaged; only tensors are loaded from "
            f"a pickle ({reason[0] if reason else type(exc).__name__})"
        ) from exc
    if not isinstance(content, dict) or not all(type(t) is Tensor for t in content.values()):
        raise ValueError(f"{file.name} is not a dict of tensors")
    return content


class _WriteBuffer(io.RawIOBase):
    """A file that buffers what a zip archive writes until `drain` removes it."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._pieces.append(bytes(data))
        return len(data)

    def drain(self) -> Iterator[bytes]:
        """Yield the bytes written since the last call."""
        pieces, self._pieces = self._pieces, []
        yield from pieces


class _Storage(NamedTuple):
    number: int
    dtype: torch.dtype
    size: int


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        if not isinstance(obj, _Storage):
            return None
        return "storage", _STORAGES[obj.dtype], str(obj.number), "cpu", obj.size

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Entry):
            return NotImplemented
        tensor = obj.tensor
        strides = tuple(prod(tensor.shape[dim + 1 :]) for dim in range(len(tensor.shape)))
        storage = _Storage(obj.number, tensor.dtype, prod(tensor.shape))
        of_hooks: OrderedDict[str, Any] = OrderedDict()
        return _rebuild_tensor_v2, (storage, 0, tensor.shape, strides, False, of_hooks)


class _Entry(NamedTuple):
    number: int
    tensor: PiecewiseTensor


def _pickled(ordered: list[PiecewiseTensor]) -> bytes:
    out = io.BytesIO()
    entries = {tensor.name: _Entry(n, tensor) for n, tensor in enumerate(ordered)}
    _Pickler(out, protocol=2).dump(entries)
    return out.getvalue()


def _bytes(tensor: PiecewiseTensor) -> Iterator[bytes]:
    left = prod(tensor.shape) * tensor.dtype.itemsize
    for piece in tensor.pieces():
        assert piece.dtype == tensor.dtype, tensor.name
        for data in torch.split(piece.contiguous().reshape(-1).view(torch.uint8), PIECE_BYTES):
            left -= len(data)
            yield data.numpy().tobytes()
    assert left == 0, f"{tensor.name} does not have the size of its shape"
