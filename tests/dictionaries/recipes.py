"""A small dictionary of every recipe with random parameters, and its dense oracle."""

import math
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from dist_sae.config.clt import CLTConfig
from dist_sae.config.crosscoder import CrosscoderBaseConfig, CrosscoderConfig
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
from dist_sae.dictionaries import build_sae
from dist_sae.dictionaries.axis import WHOLE, LatentAxis
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.interface import LossTerms, Rows, StepContext, Widths
from tests.dictionaries import reference

D_IN, N_LATENTS, K, AUXK, BATCH = 16, 64, 5, 7, 32
VARIANCE, PROGRESS = 11.0, 0.25

LAYERS = tuple(f"resid_post.{layer}" for layer in range(4))
"""Sites of the dictionaries that read several. Each site has a quarter of the width."""

CONFIGS: dict[str, DictionaryConfig] = {
    "topk": TopKConfig(n_latents=N_LATENTS, k=K, auxk=AUXK, auxk_coefficient=0.25),
    "batchtopk": BatchTopKConfig(n_latents=N_LATENTS, k=K, auxk=AUXK, auxk_coefficient=0.25),
    "matryoshka": MatryoshkaConfig(
        n_latents=N_LATENTS,
        k=K,
        auxk=AUXK,
        auxk_coefficient=0.25,
        prefixes=(0.25, 0.5),
        prefix_weights=(0.5, 2.0, 0.75),
    ),
    "routed": RoutedConfig(
        n_latents=N_LATENTS,
        experts=4,
        experts_per_row=2,
        k=2 * K,
        auxk=AUXK,
        auxk_coefficient=0.25,
        balance_coefficient=0.3,
    ),
    "transcoder": TranscoderConfig(
        n_latents=N_LATENTS, k=K, auxk=AUXK, auxk_coefficient=0.25, skip=True
    ),
    "crosscoder": CrosscoderConfig(
        n_latents=N_LATENTS,
        k=K,
        auxk=AUXK,
        auxk_coefficient=0.25,
        weighting="l1",
        shared_latents=0.1,
        reads=LAYERS,
    ),
    "crosscoder_relu": CrosscoderReLUConfig(
        n_latents=N_LATENTS, decoder_norm=0.5, weighting="l1", shared_latents=0.1, reads=LAYERS
    ),
    "jumprelu": JumpReLUConfig(
        n_latents=N_LATENTS, sparsity=0.3, initial_threshold=0.2, bandwidth=0.15
    ),
    "jumprelu_tanh": JumpReLUTanhConfig(n_latents=N_LATENTS, pre_act=0.05, bandwidth=1.0),
    "relu": ReLUConfig(n_latents=N_LATENTS, decoder_norm=0.5),
    "gated": GatedConfig(n_latents=N_LATENTS),
    "clt": CLTConfig(n_latents=N_LATENTS, k=K, auxk=AUXK, auxk_coefficient=0.25, reads=LAYERS),
    "clt_jumprelu": CLTJumpReLUConfig(
        n_latents=N_LATENTS, sparsity=0.3, initial_threshold=0.2, bandwidth=0.3, reads=LAYERS
    ),
}
VARIANTS = CONFIGS | {
    "multi-topk": CONFIGS["topk"].model_copy(update={"multi_factor": 3, "multi_weight": 0.5})
}
KINDS = tuple(CONFIGS)
SHARED = {"b_dec", "W_router", "b_router", "W_skip"}
UNIT_ROWS = ("topk", "batchtopk", "matryoshka", "routed", "jumprelu", "gated")
PENALISED = ("jumprelu", "jumprelu_tanh", "relu", "gated")
assert set(KINDS) == {c.model_fields["kind"].default for c in get_args(get_args(SaeConfig)[0])}, (
    "every recipe is tested"
)


def widths(config: DictionaryConfig, d_in: int = D_IN) -> Widths:
    """Return the widths of a dictionary's sites, which are equal and add up to `d_in`."""
    of_sites = (d_in // len(config.reads or (None,)),) * len(config.reads or (None,))
    return Widths(of_sites, of_sites)


def make(
    config: DictionaryConfig,
    dtype: torch.dtype = torch.float64,
    axis: LatentAxis = WHOLE,
    d_in: int = D_IN,
    sites: Widths | None = None,
) -> Dictionary:
    """Build a dictionary's shard with random parameters, except that decoder rows are unit."""
    sae: Dictionary = build_sae(
        config,  # type: ignore[arg-type]
        sites or widths(config, d_in),
        axis,
        product_dtype=dtype,
        dtype=dtype,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            n = len(parameter) if name in SHARED else config.n_latents
            shape = (n, *parameter.shape[1:])
            whole = 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
            if name == "theta":
                whole = 0.1 + whole.abs() / 8
            first = 0 if name in SHARED else sae.first_latent
            parameter.copy_(whole[first : first + len(parameter)])
    sae.constrain()
    return sae


def rows(dtype: torch.dtype = torch.float64, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, D_IN, generator=torch.Generator().manual_seed(2), dtype=dtype)


def sae_rows(x: Tensor) -> Rows:
    """Return the rows of an autoencoder, whose targets are its inputs."""
    return Rows(inputs=x, targets=x)


def some_dead() -> Tensor:
    return torch.arange(N_LATENTS) % 4 == 0


def step(dead: Tensor | None = None, progress: float = PROGRESS) -> StepContext:
    dead = torch.zeros(N_LATENTS, dtype=torch.bool) if dead is None else dead
    return StepContext(VARIANCE, dead, int(dead.sum()), progress)


def oracle(sae: Dictionary, x: Tensor, now: StepContext) -> LossTerms:
    losses: dict[type[DictionaryConfig], Callable[..., LossTerms]] = {
        TopKConfig: reference.topk_loss,
        BatchTopKConfig: reference.batchtopk_loss,
        MatryoshkaConfig: reference.matryoshka_loss,
        RoutedConfig: reference.routed_loss,
        TranscoderConfig: reference.transcoder_loss,
        CrosscoderConfig: reference.crosscoder_loss,
        CrosscoderReLUConfig: reference.crosscoder_relu_loss,
        JumpReLUConfig: reference.jumprelu_loss,
        JumpReLUTanhConfig: reference.jumprelu_tanh_loss,
        ReLUConfig: reference.relu_loss,
        GatedConfig: reference.gated_loss,
        CLTConfig: reference.clt_loss,
        CLTJumpReLUConfig: reference.clt_jumprelu_loss,
    }
    parameters: dict[str, Tensor] = dict(sae.named_parameters())
    if isinstance(sae.config, CrosscoderBaseConfig):
        parameters["W_dec"] = reference.constrained(sae.W_dec, sae.config)
    return losses[type(sae.config)](x, parameters, sae.config, now)


def gradients(sae: Dictionary, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*sae.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g
        for n, p, g in zip(names, parameters, found, strict=True)
    }


def along_rows(gradient: Tensor, W_dec: Tensor) -> Tensor:
    """Return the component of a gradient along unit rows."""
    return (gradient * W_dec).sum(1, keepdim=True) * W_dec


def relative_error(value: Tensor, expected: Tensor) -> float:
    difference, size = (value - expected).norm(), expected.norm()
    return (
        float((difference / size).detach()) if size > 0 else (0.0 if difference == 0 else math.inf)
    )


def check_against_oracle(sae: Dictionary, dead: str, bound: float) -> None:
    masks = {"none": None, "some": some_dead(), "all": torch.ones(N_LATENTS, dtype=torch.bool)}
    x, now = rows(sae.W_enc.dtype), step(masks[dead])
    terms, expected = sae.objective(sae_rows(x), now).terms, oracle(sae, x, now)
    for value, wanted in zip(terms, expected, strict=True):
        assert relative_error(value, wanted) <= bound
    ours, theirs = gradients(sae, terms.total), gradients(sae, expected.total)
    if sae.config.kind in UNIT_ROWS:
        theirs["W_dec"] -= along_rows(theirs["W_dec"], sae.W_dec.detach())
    for name, gradient in ours.items():
        assert theirs[name].norm() > 0, name
        assert relative_error(gradient, theirs[name]) <= bound, name
