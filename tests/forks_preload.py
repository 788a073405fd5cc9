"""Imports that processes from `tests.forks` have preloaded. Only its fork server imports this."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import accelerate  # noqa: F401
import deepspeed  # noqa: F401
import torch.distributed.tensor.parallel
from transformers import LlamaModel, PreTrainedTokenizerFast  # noqa: F401

import dist_sae.commands.cli
import dist_sae.evaluation.evaluate
import dist_sae.models.huggingface
import dist_sae.producing.loop
import dist_sae.producing.planner
import dist_sae.storage.s3
import dist_sae.training.loop  # noqa: F401
