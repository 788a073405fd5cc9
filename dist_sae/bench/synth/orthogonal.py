"""A faster equivalent of sae-lens's `orthogonalize_embeddings`, for nearly orthogonal directions.

Imports only torch, because sae-lens's Python, where dist_sae is not installed, imports this too.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def orthogonalize(directions: Tensor, steps: int, lr: float) -> Tensor:
    """Take steps of Adam on sum_{i != j} (e_i . e_j)^2 + n sum_i (|e_i|^2 - 1)^2.

    The gradient is 4 (E E^T E + n (|e|^2 - 1) e - |e|^2 e). So a step multiplies by E^T E, [d, d],
    where sae-lens multiplies all pairs of the n rows and differentiates. At 16,384 rows of width
    768, this is 20 times less work.

    Args:
        directions: [n, d], of any length.
        steps: Number of steps.
        lr: Learning rate.

    Returns:
        Unit rows, equal to sae-lens's up to rounding errors, which Adam may amplify.
    """
    e = normalize(directions, dim=1)
    optimizer = torch.optim.Adam([e], lr=lr)
    for _ in range(steps):
        square = e.square().sum(1, keepdim=True)
        e.grad = 4 * (e @ (e.T @ e) + (len(e) * (square - 1) - square) * e)
        optimizer.step()
    return normalize(e, dim=1)
