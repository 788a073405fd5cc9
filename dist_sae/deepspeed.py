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
    # None of its compiled operators is used. To look which ones could be runs compilers, queries
    # GPUs and warns where there is no nvcc. One would be chosen unasked: its all-reduce for
    # inference, which compiles for a minute, ends processes under torchrun and leaves 66 MiB per
    # rank in /dev/shm; Gloo and NCCL do the same without it.
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed
