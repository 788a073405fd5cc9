"""DeepSpeed, imported as all of this needs it."""

import logging
import os
from typing import Any

import torch


def import_deepspeed() -> Any:
    """The module; it takes seconds, and looks at the environment."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", os.environ.get("RANK", "0"))  # it insists on it
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # An all-reduce for inference that DeepSpeed would compile for a minute at first use, that ends
    # processes under torchrun, and that leaves 66 MiB per rank in /dev/shm. Gloo or NCCL do it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
