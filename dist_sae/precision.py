"""Which precisions a processor computes in, and which it only imitates."""

import logging

import torch

logger = logging.getLogger(__name__)


def is_emulated(precision: str, device: torch.device) -> bool:
    """Whether there are no instructions for `bf16` or `fp16` there; GPUs have them."""
    if device.type != "cpu" or precision == "fp32":
        return False
    has = torch.cpu.get_capabilities()
    return not any(there for name, there in has.items() if precision in name)


def warn_if_emulated(setting: str, precision: str, device: torch.device) -> None:
    """Tell whoever reads the log that a setting costs them time.

    With AVX2 a product in bf16 takes eight times as long as in fp32.
    """
    if is_emulated(precision, device):
        logger.warning(
            "%s: %s: this processor has no instructions for it; fp32 is faster, or much faster",
            setting,
            precision,
        )
