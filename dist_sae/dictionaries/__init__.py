"""Sparse dictionaries: recipes, selections, losses, initial weights, dead latents and metrics."""

from typing import assert_never

import torch

from dist_sae.config.matryoshka import MatryoshkaConfig
from dist_sae.config.sae import (
    BatchTopKConfig,
    JumpReLUConfig,
    JumpReLUTanhConfig,
    ReLUConfig,
    RoutedConfig,
    SaeConfig,
    TopKConfig,
)
from dist_sae.dictionaries.axis import WHOLE, LatentAxis
from dist_sae.dictionaries.interface import Widths
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
) -> TopK | Routed | JumpReLU | JumpReLUTanh | ReLU:
    """An empty dictionary of the kind that `config` names; the arguments of `Dictionary`."""
    arguments = widths, axis, kernels, product_dtype, dtype
    match config:
        case TopKConfig() | BatchTopKConfig():
            return TopK(config, *arguments)
        case MatryoshkaConfig():
            return Matryoshka(config, *arguments)
        case RoutedConfig():
            return Routed(config, *arguments)
        case JumpReLUConfig():
            return JumpReLU(config, *arguments)
        case JumpReLUTanhConfig():
            return JumpReLUTanh(config, *arguments)
        case ReLUConfig():
            return ReLU(config, *arguments)
        case _:
            assert_never(config)
