"""Selection of the implementation of the sparse products."""

import importlib.util
import logging
from typing import Literal

import torch

from dist_sae.errors import ConfigError
from dist_sae.kernels import Kernels, native
from dist_sae.kernels.torch import KERNELS as TORCH

logger = logging.getLogger(__name__)


def choose_kernels(
    requested: Literal["auto", "torch", "native", "triton"], device: torch.device
) -> Kernels:
    """Return the kernels that the run file names, or for `auto` the fastest for the device.

    Raises:
        ConfigError: The named kernels cannot run on this device.
    """
    kernels, reason = TORCH, None
    match requested, device.type:
        case (("auto" | "native"), "cpu"):
            reason = native.available()
            kernels = native.kernels() if reason is None else TORCH
        case (("auto" | "triton"), "cuda") if torch.version.hip is None:
            if importlib.util.find_spec("triton") is None:
                reason = "triton is not installed"
            else:
                from dist_sae.kernels.triton import KERNELS as TRITON

                kernels = TRITON
        case "native", _:
            reason = f"it runs only on the CPU, not on {device.type}"
        case "triton", _:
            reason = f"it runs only on NVIDIA GPUs, not on {device.type}"
    if reason is not None and requested != "auto":
        raise ConfigError(f"train.kernels: {requested}: {reason}; use auto or torch")
    why = f" ({reason})" if reason else ""
    logger.info("sparse products: %s, on %s%s", kernels.name, device, why)
    return kernels
