"""Stopping together: a signal to any rank becomes one decision of all."""

import threading

import torch

from dist_sae.parallel.mesh import Mesh


def agreed(mesh: Mesh, stopping: threading.Event) -> bool:
    """Whether any rank was asked to stop; the same answer on every rank. Collective."""
    flag = torch.tensor([stopping.is_set()], device=mesh.device)
    return bool(mesh.any(flag))
