"""Sparse dictionaries: recipes, selections, losses, initial weights, dead latents and metrics."""

from typing import assert_never

import torch

from dist_sae.config.clt import CLTConfig
from dist_sae.config.matryoshka import MatryoshkaConfig
from dist_sae.config.sae import (
    BatchTopKConfig,
    CLTJumpReLUConfig,
    GatedConfig,
    JumpReLUConfig,
    JumpReLUTanhConfig,
    ReLUConfig,
    RoutedConfig,
    SaeConfig,
    TopKConfig,
)
from dist_sae.dictionaries.axis import WHOLE, LatentAxis
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.interface import Widths
from dist_sae.dictionaries.recipes.clt import CLT, CLTJumpReLU
from dist_sae.dictionaries.recipes.gated import Gated
from dist_sae.dictionaries.recipes.jumprelu import JumpReLU
from dist_sae.dictionaries.recipes.jumprelu_tanh import JumpReLUTanh
from dist_sae.dictionaries.recipes.matryoshka import Matryoshka
from dist_sae.dictionaries.recipes.relu import ReLU
from dist_sae.dictionaries.recipes.routed import Routed
from dist_sae.dictionaries.recipes.topk import TopK
from dist_sae.kernels import Kernels
from dist_sae.kernels.torch import KERNELS

PRODUCT_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_sae(
    config: SaeConfig,
    widths: Widths | int,
    axis: LatentAxis = WHOLE,
    kernels: Kernels = KERNELS,
    product_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
) -> Dictionary:
    """An empty dictionary of the kind that `config` names; the arguments of `Dictionary`."""
    arguments = widths, axis, kernels, product_dtype, dtype
    sae: Dictionary
    match config:
        case TopKConfig() | BatchTopKConfig():
            sae = TopK(config, *arguments)
        case MatryoshkaConfig():
            sae = Matryoshka(config, *arguments)
        case RoutedConfig():
            sae = Routed(config, *arguments)
        case CLTConfig():
            sae = CLT(config, *arguments)
        case CLTJumpReLUConfig():
            sae = CLTJumpReLU(config, *arguments)
        case JumpReLUConfig():
            sae = JumpReLU(config, *arguments)
        case JumpReLUTanhConfig():
            sae = JumpReLUTanh(config, *arguments)
        case ReLUConfig():
            sae = ReLU(config, *arguments)
        case GatedConfig():
            sae = Gated(config, *arguments)
        case _:
            assert_never(config)
    return sae
