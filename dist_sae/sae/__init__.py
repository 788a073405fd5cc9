"""The dictionaries."""

from typing import assert_never

import torch

from dist_sae.config.sae import SaeConfig, TopKConfig
from dist_sae.sae.topk import TopK

PRODUCT_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_sae(config: SaeConfig, d_in: int, products: str = "fp32") -> TopK:
    """An empty dictionary of the kind that `config` names."""
    match config:
        case TopKConfig():
            return TopK(config, d_in, PRODUCT_DTYPES[products])
        case _:
            assert_never(config)
