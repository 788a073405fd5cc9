"""Sparse dictionaries: recipes, selections, losses, initialization, dead latents and metrics."""

import torch

from dist_sae.config.clt import CLTConfig
from dist_sae.config.crosscoder import CrosscoderConfig
from dist_sae.config.dictionary import DictionaryConfig
from dist_sae.config.matryoshka import MatryoshkaConfig
from dist_sae.config.sae import (
    BatchTopKConfig,
    CLTJumpReLUConfig,
    CrosscoderReLUConfig,
    GatedConfig,
    JumpReLUConfig,
    JumpReLUTanhConfig,
    ReLUConfig,
    RoutedConfig,
    SaeConfig,
    TopKConfig,
)
from dist_sae.config.transcoder import TranscoderConfig
from dist_sae.dictionaries.axis import WHOLE, LatentAxis
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.interface import Widths
from dist_sae.dictionaries.recipes.clt import CLT, CLTJumpReLU
from dist_sae.dictionaries.recipes.crosscoder import Crosscoder
from dist_sae.dictionaries.recipes.crosscoder_relu import CrosscoderReLU
from dist_sae.dictionaries.recipes.gated import Gated
from dist_sae.dictionaries.recipes.jumprelu import JumpReLU
from dist_sae.dictionaries.recipes.jumprelu_tanh import JumpReLUTanh
from dist_sae.dictionaries.recipes.matryoshka import Matryoshka
from dist_sae.dictionaries.recipes.relu import ReLU
from dist_sae.dictionaries.recipes.routed import Routed
from dist_sae.dictionaries.recipes.topk import TopK
from dist_sae.dictionaries.recipes.transcoder import Transcoder
from dist_sae.kernels import Kernels
from dist_sae.kernels.torch import KERNELS

PRODUCT_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


_RECIPES: dict[type[DictionaryConfig], type[Dictionary]] = {
    TopKConfig: TopK,
    BatchTopKConfig: TopK,
    MatryoshkaConfig: Matryoshka,
    RoutedConfig: Routed,
    TranscoderConfig: Transcoder,
    CrosscoderConfig: Crosscoder,
    JumpReLUConfig: JumpReLU,
    JumpReLUTanhConfig: JumpReLUTanh,
    ReLUConfig: ReLU,
    CrosscoderReLUConfig: CrosscoderReLU,
    GatedConfig: Gated,
    CLTConfig: CLT,
    CLTJumpReLUConfig: CLTJumpReLU,
}


def build_sae(
    config: SaeConfig,
    widths: Widths | int,
    axis: LatentAxis = WHOLE,
    kernels: Kernels = KERNELS,
    product_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
) -> Dictionary:
    """Build a dictionary of the kind that `config` names, with all weights 0.

    The arguments are those of `Dictionary`.
    """
    return _RECIPES[type(config)](config, widths, axis, kernels, product_dtype, dtype)
