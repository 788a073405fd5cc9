"""Detection of precisions that the processor has to emulate."""

import logging

import torch

logger = logging.getLogger(__name__)


def is_emulated(precision: str, device: torch.device) -> bool:
    """Return True if a CPU has no instructions for `bf16` or `fp16`. GPUs always have them."""
    if device.type != "cpu" or precision == "fp32":
        return False
    has = torch.cpu.get_capabilities()
    return not any(there for name, there in has.items() if precision in name)


def warn_if_emulated(setting: str, precision: str, device: torch.device) -> None:
    """Warn if the device emulates a setting's precision, which is slow.

    With AVX2 a product in bf16 takes eight times as long as in fp32.
    """
    if is_emulated(precision, device):
        logger.warning(
            "%s: %s: this processor emulates it, which is slow; use fp32",
            setting,
            precision,
        )
