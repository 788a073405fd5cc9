"""Thresholds as checkpoints once had them: `log_threshold`, of thresholds in the rows' scale.

The parameter is now `theta`, in units of the rows' root mean square norm, sqrt(d_in):

    theta = exp(log_threshold) / sqrt(d_in)        dL/dtheta = dL/dlog_threshold / theta

so that Adam's moments are divided by theta and its square.
"""

import math
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

_OLD, _NEW = "log_threshold", "theta"
_T = TypeVar("_T")


def renamed(tensors: dict[str, _T], mark: Callable[[_T], _T]) -> dict[str, _T]:
    """The tensors of a checkpoint by today's names; `mark` is applied to those that had others."""
    return {
        name.removesuffix(_OLD) + _NEW if name.endswith(_OLD) else name: (
            mark(tensor) if name.endswith(_OLD) else tensor
        )
        for name, tensor in tensors.items()
    }


def converted(name: str, rows: Tensor, d_in: int, theta: Callable[[], Tensor]) -> Tensor:
    """Rows of a tensor that had another name, as they are now.

    Args:
        name: Today's.
        rows: As stored.
        d_in: Width of the activations.
        theta: Gives the thresholds of the same rows, converted.
    """
    if name.startswith("exp_avg_sq."):
        return rows / theta().square()
    if name.startswith("exp_avg."):
        return rows / theta()
    return rows.exp() / math.sqrt(d_in)
