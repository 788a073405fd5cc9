"""Conversion of old checkpoints, which contain `log_threshold`, in the scale of the rows.

The current parameter is `theta`, in units of the rows' root mean square norm, sqrt(d_in):

    theta = exp(log_threshold) / sqrt(d_in)        dL/dtheta = dL/dlog_threshold / theta

So Adam's first moment is divided by theta, and its second by theta^2.
"""

import math
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

_OLD, _NEW = "log_threshold", "theta"
_T = TypeVar("_T")


def renamed(tensors: dict[str, _T], mark: Callable[[_T], _T]) -> dict[str, _T]:
    """Give a checkpoint's tensors their current names. `mark` is applied to renamed ones."""
    return {
        name.removesuffix(_OLD) + _NEW if name.endswith(_OLD) else name: (
            mark(tensor) if name.endswith(_OLD) else tensor
        )
        for name, tensor in tensors.items()
    }


def converted(name: str, rows: Tensor, d_in: int, theta: Callable[[], Tensor]) -> Tensor:
    """Convert rows of a renamed tensor.

    Args:
        name: Current name of the tensor.
        rows: The stored rows.
        d_in: Width of the activations.
        theta: Function that returns the converted thresholds of the same rows.
    """
    if name.startswith("exp_avg_sq."):
        return rows / theta().square()
    if name.startswith("exp_avg."):
        return rows / theta()
    return rows.exp() / math.sqrt(d_in)
