"""Writing safetensors files in pieces, so that no tensor has to be in memory as a whole.

8 bytes   length of the header, little-endian
header    JSON: dtype, shape and offsets of each tensor; padded with spaces to 8 bytes
data      the tensors' rows, tensor after tensor
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from dist_sae.checkpoint.layout import Checkpoint

PIECE_BYTES = 16 * 2**20
"""Maximum number of bytes that are yielded at a time."""
_ALIGNMENT = 8
_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = list(_DTYPES)  # the safetensors library's order, which aligns every tensor to its dtype
TRANSPOSED_BYTES = 512 * 2**20
"""Maximum number of bytes of a transposed tensor in memory."""


class PiecewiseTensor(NamedTuple):
    """A tensor whose values are produced in pieces."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]
    """Returns the pieces in order along dim 0. Each may be overwritten by the next."""


def stored_tensor(checkpoint: Checkpoint, name: str) -> PiecewiseTensor:
    """Return a checkpoint's tensor, with its parts as the pieces.

    Raises:
        CorruptObjectError: The first part is damaged. For other parts, iterating over the pieces
            raises this error.
    """
    shape = checkpoint.manifest.tensors[name].shape
    if not shape:
        scalar = checkpoint.read(name)
        return PiecewiseTensor(name, scalar.dtype, shape, lambda: (scalar,))
    dtype = checkpoint.read(name, 0, 1).dtype
    return PiecewiseTensor(
        name, dtype, shape, lambda: (rows for _, rows in checkpoint.pieces(name, 0, shape[0]))
    )


def transposed(
    name: str, shape: tuple[int, int], columns: Callable[[slice], Iterable[Tensor]]
) -> PiecewiseTensor:
    """Return the transpose of an fp32 matrix that is produced row by row.

    To bound the memory, the matrix is produced several times, each time only a range of columns.

    Args:
        name: Name of the tensor.
        shape: Shape of the transpose.
        columns: Function that yields a slice of the matrix's columns, in pieces along dim 0.
    """
    height, width = shape
    at_a_time = max(1, TRANSPOSED_BYTES // (width * torch.float32.itemsize))

    def pieces() -> Iterator[Tensor]:
        memory = torch.empty(min(at_a_time, height), width)
        for first in range(0, height, at_a_time):
            taken = slice(first, min(first + at_a_time, height))
            block, at = memory[: taken.stop - first], 0
            for rows in columns(taken):
                block[:, at : at + len(rows)] = rows.T
                at += len(rows)
            assert at == width
            yield block

    return PiecewiseTensor(name, torch.float32, shape, pieces)


def safetensors_pieces(
    tensors: Iterable[PiecewiseTensor], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes]:
    """Yield the bytes of a safetensors file in pieces.

    Args:
        tensors: The tensors, with distinct names.
        metadata: Metadata of the file.
    """
    ordered = sorted(tensors, key=lambda tensor: (_ORDER.index(tensor.dtype), tensor.name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape, _ in ordered:
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for name, dtype, shape, pieces in ordered:
        left = prod(shape) * dtype.itemsize
        for piece in pieces():
            assert piece.dtype == dtype, name
            flat = piece.contiguous().reshape(-1).view(torch.uint8)
            for data in torch.split(flat, PIECE_BYTES):
                left -= len(data)
                yield data.numpy().tobytes()
        assert left == 0, f"{name} has a size that does not match its shape"
