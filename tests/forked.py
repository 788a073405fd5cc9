"""What processes of `tests.forks` begin with; only its server imports this."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import accelerate  # noqa: F401
import deepspeed  # noqa: F401
import torch.distributed.tensor.parallel
from transformers import LlamaModel, PreTrainedTokenizerFast  # noqa: F401

import dist_sae.cli
import dist_sae.evaluate
import dist_sae.models.huggingface
import dist_sae.plan
import dist_sae.produce
import dist_sae.storage.s3
import dist_sae.train  # noqa: F401
