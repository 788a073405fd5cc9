"""A simulated device that shows where code would fail on a GPU, or make the host wait for it.

The device's tensors have their data on the CPU, but report `DEVICE`. Inside `fake_device`, an
operator on tensors of both devices raises as with CUDA. Each wait of the host for the device is
counted, with the line that causes it. The simulation says nothing about speed.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import dist_sae

DEVICE = torch.device("meta")
"""The only device other than the CPU that every build of torch and its autograd support."""

_PACKAGE = str(Path(dist_sae.__file__).parent)
# operators that return numbers, or tensors whose size depends on data on the device
_WAITS = {
    "_local_scalar_dense": 1,
    "_unique2": 1,
    "bincount": 2,  # reads the minimum and the maximum
    "equal": 1,
    "masked_select": 1,
    "nonzero": 1,
    "unique_consecutive": 1,
    "unique_dim": 1,
}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_COPIES = {"_to_copy", "copy_"}
_waits: Counter[str] = Counter()


class OnDevice(Tensor):
    """A tensor that reports that it is on the device."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> "OnDevice":
        found: OnDevice = Tensor._make_wrapper_subclass(  # noqa: SLF001
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=DEVICE,
        )
        found.numbers = numbers
        return found

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: Tensor) -> None:
        assert isinstance(other, OnDevice)
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.numbers = other.numbers

    def tolist(self) -> Any:
        _wait("tolist")
        return self.numbers.tolist()

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None, **others: Any) -> Tensor:  # type: ignore[override]
        return torch.tensor(data, dtype=dtype or self.dtype, **({"device": DEVICE} | others))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.numbers!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{func}: outside of fake_device()")


@contextmanager
def fake_device() -> Iterator[Counter[str]]:
    """Simulate `DEVICE` inside the `with` block.

    Yields:
        Number of the host's waits so far, by line and cause.
    """
    _waits.clear()
    with (
        # module.to() then replaces parameters instead of setting their data
        mock.patch("torch.__future__.get_overwrite_module_params_on_conversion", return_value=True),
        mock.patch("torch.tensor", _tensor),
        _Operators(),  # type: ignore[no-untyped-call]
    ):
        yield _waits


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that computes on the CPU, and checks the devices of operands."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, kwargs = func.overloadpacket.__name__, dict(kwargs or {})
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        there = {id(t.numbers): t for t in given if isinstance(t, OnDevice)}
        result_there = isinstance(args[0], OnDevice) if name == "copy_" else bool(there)
        if kwargs.get("device") is not None:
            result_there = torch.device(kwargs["device"]) == DEVICE
            kwargs["device"] = torch.device("cpu")
        if name in _COPIES:
            _count_copy(name, given[-1], args, kwargs, into=result_there)
        elif there:
            _check(name, given)
            _count(name, args, kwargs)

        def where_it_belongs(result: Any) -> Any:
            if not isinstance(result, Tensor) or not result_there:
                return result
            changed_in_place = there.get(id(result))
            return OnDevice(result) if changed_in_place is None else changed_in_place

        args, kwargs = tree_map(
            lambda t: t.numbers if isinstance(t, OnDevice) else t, (args, kwargs)
        )
        return tree_map(where_it_belongs, func(*args, **kwargs))


def _check(name: str, given: Sequence[Tensor]) -> None:
    """Raise where CUDA would. Scalars on the CPU are allowed, other CPU tensors are not."""
    here = [t for t in given if not isinstance(t, OnDevice) and t.ndim]
    if here and name in _INDEXING:
        _wait(f"{name}: copy of an index to the device", len(here))
    elif here:
        raise RuntimeError(f"{name}: tensors on two devices")


def _count(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Count the waits that an operator on the device causes."""
    if name in _WAITS:
        _wait(name, _WAITS[name])
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        _wait(name)
    if name in _INDEXING:
        masks = sum(i is not None and i.dtype == torch.bool for i in args[1])
        fills = name != "index" and args[2].numel() == 1  # implemented as masked_fill, no wait
        if masks and not fills:
            _wait(f"{name} by a mask", masks)


def _count_copy(
    name: str, source: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any], *, into: bool
) -> None:
    at_once = args[2] if name == "copy_" and len(args) > 2 else kwargs.get("non_blocking")
    if isinstance(source, OnDevice) != into and not at_once:
        _wait("copy to the device" if into else "copy from the device")


def _wait(cause: str, times: int = 1) -> None:
    """Count a wait at the innermost line in the package, or else at that in the tests."""
    frame, found = sys._getframe(1), ""  # noqa: SLF001
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_PACKAGE):
            found = f"{file[len(_PACKAGE) + 1 :]}:{frame.f_lineno} "
            break
        if not found and "/tests/" in file and file != __file__:
            found = f"{Path(file).name}:{frame.f_lineno} "
        frame = frame.f_back  # type: ignore[assignment]
    _waits[f"{found}{cause}"] += times


_made_of = torch.tensor


def _tensor(data: Any, *, device: Any = None, **others: Any) -> Tensor:
    made = _made_of(data, device="cpu", **others)
    if device is None or torch.device(device) != DEVICE:
        return made
    _wait("torch.tensor: copy to the device")
    return OnDevice(made)
