"""Import of DeepSpeed with the environment that it needs."""

import logging
import os
from typing import Any

import torch


def import_deepspeed() -> Any:
    """Import DeepSpeed, which takes seconds and reads environment variables."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", os.environ.get("RANK", "0"))  # DeepSpeed requires it
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # We use none of DeepSpeed's compiled operators. The check for compatible ones runs compilers,
    # queries GPUs and warns if there is no nvcc. DeepSpeed would also choose one by itself: its
    # all-reduce for inference, which compiles for a minute, ends processes under torchrun and
    # leaves 66 MiB per rank in /dev/shm. Gloo and NCCL do the all-reduce without it.
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed
