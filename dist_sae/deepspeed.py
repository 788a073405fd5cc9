"""Import of DeepSpeed, with the environment it needs."""

import logging
import os
from typing import Any

import torch


def import_deepspeed() -> Any:
    """Import DeepSpeed, which takes seconds and reads the environment."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", os.environ.get("RANK", "0"))  # it requires one
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed's all-reduce for inference compiles for a minute at first use, ends processes under
    # torchrun and leaves 66 MiB per rank in /dev/shm; Gloo and NCCL do the same without it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
