"""Dense reference implementations of all recipes' losses, with autograd. Slow and obvious."""

import math
from typing import Any

import torch
from torch import Tensor

from dist_sae.config.clt import CLTConfig
from dist_sae.config.crosscoder import CrosscoderBaseConfig, CrosscoderConfig
from dist_sae.config.dictionary import KSelectionConfig
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
    TopKConfig,
)
from dist_sae.config.transcoder import TranscoderConfig
from dist_sae.dictionaries.interface import LossTerms, StepContext
from dist_sae.dictionaries.schedules import annealed, warmed_up

Parameters = dict[str, Tensor]


def topk_loss(x: Tensor, p: Parameters, config: TopKConfig, step: StepContext) -> LossTerms:
    """Compute the loss of `dictionaries/recipes/topk.py`."""
    k = annealed(step.progress, config.k, config.k_start, config.k_anneal_share)
    pre_acts = (x - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
    terms = _with_auxk(x, _topk(pre_acts, k).relu(), pre_acts, p, config, step)
    if config.multi_factor is None:
        return terms
    acts = _topk(pre_acts, config.multi_factor * k).relu()
    wide = _fvu(x, acts @ p["W_dec"] + p["b_dec"], step)
    return terms._replace(total=terms.total + config.multi_weight * wide)


def batchtopk_loss(
    x: Tensor, p: Parameters, config: BatchTopKConfig, step: StepContext
) -> LossTerms:
    """Compute the BatchTopK loss of `dictionaries/recipes/topk.py`."""
    k = annealed(step.progress, config.k, config.k_start, config.k_anneal_share)
    pre_acts = (x - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
    return _with_auxk(x, _batch_topk(pre_acts, k), pre_acts, p, config, step)


def matryoshka_loss(
    x: Tensor, p: Parameters, config: MatryoshkaConfig, step: StepContext
) -> LossTerms:
    """Compute the loss of `dictionaries/recipes/matryoshka.py`, with a mask for each prefix."""
    k = annealed(step.progress, config.k, config.k_start, config.k_anneal_share)
    pre_acts = (x - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
    acts = _batch_topk(pre_acts, k)
    terms = _with_auxk(x, acts, pre_acts, p, config, step)
    total = config.auxk_coefficient * terms.auxk
    numbers = torch.tensor([config.prefix_of(latent) for latent in range(config.n_latents)])
    for number, weight in enumerate(config.weights):
        x_hat = (acts * (numbers <= number)) @ p["W_dec"] + p["b_dec"]
        total = total + weight * _fvu(x, x_hat, step)
    return terms._replace(total=total)


def routed_loss(x: Tensor, p: Parameters, config: RoutedConfig, step: StepContext) -> LossTerms:
    """Compute the routed loss with all experts on all rows and a mask. Ignores the capacity."""
    experts, chosen = config.experts, config.experts_per_row
    k = annealed(step.progress, config.k, config.k_start, config.k_anneal_share)
    pre_acts = (x - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
    router = ((x - p["b_dec"]).detach() @ p["W_router"].T + p["b_router"]).softmax(1)
    sent = _topk(router, chosen) > 0
    gates = (router * sent)[:, :, None]
    if config.gate == "straight_through":
        gates = gates / gates.sum(1, keepdim=True).detach()

    def kept(pre_acts: Tensor, k: int) -> Tensor:
        by_expert = pre_acts.reshape(len(x) * experts, -1)
        return _topk(by_expert, min(k, by_expert.shape[1])).relu().reshape(len(x), experts, -1)

    def decoded(acts: Tensor, gates: Tensor) -> Tensor:
        return (acts * gates).flatten(1) @ p["W_dec"]

    if config.selection == "row":
        acts = kept(pre_acts, k // chosen)
    else:
        met = (pre_acts.reshape(len(x), experts, -1) * sent[:, :, None]).flatten(1)
        acts = _batch_topk(met, k).reshape(len(x), experts, -1)
    x_hat = decoded(acts, gates) + p["b_dec"]
    fvu = _fvu(x, x_hat, step)
    error, aux = (x - x_hat).detach(), fvu.new_zeros(())
    if config.auxk and step.dead.any():
        among_dead = pre_acts.where(step.dead, -torch.inf)
        e_hat = decoded(kept(among_dead, max(1, config.auxk // chosen)), gates.detach())
        aux = (error - e_hat).square().sum() / (error - error.mean(0)).square().sum()
    share = sent.sum(0) / sent.sum()
    imbalance = config.balance_coefficient * (experts * (share * router.mean(0)).sum() - 1)
    return LossTerms(fvu, aux, imbalance, fvu + config.auxk_coefficient * aux + imbalance)


def transcoder_loss(
    x: Tensor,
    p: Parameters,
    config: TranscoderConfig,
    step: StepContext,
    targets: Tensor | None = None,
) -> LossTerms:
    """Compute the loss of `dictionaries/recipes/transcoder.py`. The default targets are x."""
    k = annealed(step.progress, config.k, config.k_start, config.k_anneal_share)
    pre_acts = x @ p["W_enc"].T + p["b_enc"]
    acts = _topk(pre_acts, k).relu() if config.selection == "row" else _batch_topk(pre_acts, k)
    y = x if targets is None else targets
    if config.skip:
        y = y - x @ p["W_skip"].T
    return _with_auxk(y, acts, pre_acts, p, config, step)


def jumprelu_loss(
    x: Tensor,
    p: Parameters,
    config: JumpReLUConfig,
    step: StepContext,
    rms_norm: float | None = None,
) -> LossTerms:
    """Compute the loss of `dictionaries/recipes/jumprelu.py`."""
    rms_norm = rms_norm or x.shape[1] ** 0.5
    eps = (config.bandwidth or config.least_code) * rms_norm
    z, theta = x @ p["W_enc"].T + p["b_enc"], p["theta"] * rms_norm
    acts = _JumpReLU.apply(z, theta, eps, False)  # type: ignore[no-untyped-call]
    l0 = _Step.apply(z, theta, eps).sum() / len(x)  # type: ignore[no-untyped-call]
    fvu = _fvu(x, acts @ p["W_dec"] + p["b_dec"], step)
    share = config.sparsity_warmup_share
    if config.target_l0 is None:
        sparsity = warmed_up(step.progress, config.coefficient, share) * l0
    else:
        start = min(config.l0_at_start(x.shape[1]), config.n_latents / 2)
        target = start + warmed_up(step.progress, config.target_l0 - start, share)
        sparsity = 4 * (l0 / target - 1).square()
    return LossTerms(fvu, fvu.new_zeros(()), sparsity, fvu + sparsity)


def jumprelu_tanh_loss(
    x: Tensor, p: Parameters, config: JumpReLUTanhConfig, step: StepContext
) -> LossTerms:
    """Compute the loss of `dictionaries/recipes/jumprelu_tanh.py`."""
    d_in = x.shape[1]
    z, theta = x @ p["W_enc"].T + p["b_enc"], p["theta"] * d_in**0.5
    norms = p["W_dec"].norm(dim=1)
    acts = _JumpReLU.apply(z, theta, config.bandwidth, True)  # type: ignore[no-untyped-call]
    fvu = _fvu(x, acts @ p["W_dec"] + p["b_dec"], step)
    coefficient = warmed_up(step.progress, config.cost(d_in) * d_in, config.sparsity_warmup_share)
    penalty = coefficient * torch.tanh(config.tanh_scale * acts * norms).sum()
    penalty = penalty + config.pre_act * ((theta - z).relu() * norms).sum()
    sparsity = penalty / (len(x) * step.variance)
    return LossTerms(fvu, fvu.new_zeros(()), sparsity, fvu + sparsity)


def relu_loss(x: Tensor, p: Parameters, config: ReLUConfig, step: StepContext) -> LossTerms:
    """Compute the loss of `dictionaries/recipes/relu.py`."""
    acts = (x @ p["W_enc"].T + p["b_enc"]).relu()
    fvu = _fvu(x, acts @ p["W_dec"] + p["b_dec"], step)
    l1 = (acts * p["W_dec"].norm(dim=1)).sum() / (len(x) * step.variance)
    sparsity = warmed_up(step.progress, config.sparsity, config.sparsity_warmup_share) * l1
    return LossTerms(fvu, fvu.new_zeros(()), sparsity, fvu + sparsity)


def gated_loss(x: Tensor, p: Parameters, config: GatedConfig, step: StepContext) -> LossTerms:
    """Compute the loss of `dictionaries/recipes/gated.py`."""
    products = x @ p["W_enc"].T
    gates = (products + p["b_enc"]).relu()
    acts = (gates > 0) * (p["r_mag"].exp() * products + p["b_mag"]).relu()
    fvu = _fvu(x, acts @ p["W_dec"] + p["b_dec"], step)
    by_gates = _fvu(x, gates @ p["W_dec"].detach() + p["b_dec"].detach(), step)
    l1 = gates.sum() / (len(x) * step.variance)
    sparsity = warmed_up(step.progress, config.sparsity, config.sparsity_warmup_share) * l1
    return LossTerms(fvu, by_gates, sparsity, fvu + by_gates + sparsity)


def clt_loss(x: Tensor, p: Parameters, config: CLTConfig, step: StepContext) -> LossTerms:
    """Compute the loss of `dictionaries/recipes/clt.py`, with zeros for missing layers."""
    k = annealed(step.progress, config.k, config.k_start, config.k_anneal_share)
    p = across_layers(p, config.layers)
    pre_acts = x @ p["W_enc"].T + p["b_enc"]
    return _with_auxk(x, _batch_topk(pre_acts, k), pre_acts, p, config, step)


def clt_jumprelu_loss(
    x: Tensor, p: Parameters, config: CLTJumpReLUConfig, step: StepContext
) -> LossTerms:
    """Compute the JumpReLU loss of `dictionaries/recipes/clt.py`.

    Thresholds are in units of the RMS norm of one layer's rows.
    """
    across = across_layers(p, config.layers)
    return jumprelu_loss(x, across, config, step, rms_norm=p["W_enc"].shape[1] ** 0.5)


def across_layers(p: Parameters, layers: int) -> Parameters:
    """Return weights over all layers, with zeros at layers that a latent does not read or write."""
    n, d_read = p["W_enc"].shape
    d_write = len(p["b_dec"]) // layers
    encoder, decoder = (p["W_enc"].new_zeros(n, layers, d) for d in (d_read, d_write))
    of_group = list(p["W_dec"].reshape(n // layers, -1, d_write).unbind(1))
    for layer in range(layers):
        encoder[layer::layers, layer] = p["W_enc"][layer::layers]
        for written in range(layer, layers):
            decoder[layer::layers, written] = of_group.pop(0)
    return {**p, "W_enc": encoder.flatten(1), "W_dec": decoder.flatten(1)}


def constrained(W_dec: Tensor, config: CrosscoderBaseConfig) -> Tensor:
    """Return a crosscoder's decoder that meets its constraints, as a function of free parameters.

    Parameters that meet the constraints are returned unchanged.
    """
    share, n, sites = config.shared_latents, len(W_dec), len(config.reads or (None,))
    shared = torch.tensor([math.floor((i + 1) * share) > math.floor(i * share) for i in range(n)])
    apart = W_dec.reshape(n, sites, -1) if share else W_dec[:, None]
    rows = apart.mean(1, keepdim=True).expand_as(apart).where(shared[:, None, None], apart)
    rows = rows.flatten(1)
    if isinstance(config, CrosscoderReLUConfig):
        return rows
    lengths = torch.where(shared, config.shared_penalty**0.5, torch.ones(n).to(rows))
    return rows * (lengths / _weights(rows, config))[:, None]


def _weights(rows: Tensor, config: CrosscoderBaseConfig) -> Tensor:
    apart: Tensor = rows.reshape(len(rows), len(config.reads or (None,)), -1).norm(dim=2)
    weights: Tensor = apart.sum(1) if config.weighting == "l1" else apart.norm(dim=1)
    return weights


def crosscoder_loss(
    x: Tensor, p: Parameters, config: CrosscoderConfig, step: StepContext
) -> LossTerms:
    """Compute the loss of `dictionaries/recipes/crosscoder.py`. All sites have the same width."""
    k = annealed(step.progress, config.k, config.k_start, config.k_anneal_share)
    pre_acts = (x - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
    acts = _topk(pre_acts, k).relu() if config.selection == "row" else _batch_topk(pre_acts, k)
    return _with_auxk(x, acts, pre_acts, p, config, step)


def crosscoder_relu_loss(
    x: Tensor, p: Parameters, config: CrosscoderReLUConfig, step: StepContext
) -> LossTerms:
    """Compute the loss of `dictionaries/recipes/crosscoder_relu.py` for sites of equal width."""
    acts = (x @ p["W_enc"].T + p["b_enc"]).relu()
    fvu = _fvu(x, acts @ p["W_dec"] + p["b_dec"], step)
    weights = _weights(p["W_dec"], config)
    share = config.shared_latents
    costs = [
        config.shared_penalty if math.floor((i + 1) * share) > math.floor(i * share) else 1.0
        for i in range(len(weights))
    ]
    l1 = (acts * weights * x.new_tensor(costs)).sum() / (len(x) * step.variance)
    sparsity = warmed_up(step.progress, config.sparsity, config.sparsity_warmup_share) * l1
    return LossTerms(fvu, fvu.new_zeros(()), sparsity, fvu + sparsity)


def _with_auxk(
    x: Tensor,
    acts: Tensor,
    pre_acts: Tensor,
    p: Parameters,
    config: KSelectionConfig,
    step: StepContext,
) -> LossTerms:
    x_hat = acts @ p["W_dec"] + p["b_dec"]
    fvu = _fvu(x, x_hat, step)
    error, aux = (x - x_hat).detach(), fvu.new_zeros(())
    if config.auxk and step.dead.any():
        among_dead = pre_acts.where(step.dead, -torch.inf)
        e_hat = _topk(among_dead, min(config.auxk, int(step.dead.sum()))).relu() @ p["W_dec"]
        spread = (error - error.mean(0)).square().sum()
        if spread > 0:
            aux = (error - e_hat).square().sum() / spread
    return LossTerms(fvu, aux, fvu.new_zeros(()), fvu + config.auxk_coefficient * aux)


def _fvu(x: Tensor, x_hat: Tensor, step: StepContext) -> Tensor:
    return (x - x_hat).square().sum() / (len(x) * step.variance)


def _topk(values: Tensor, k: int) -> Tensor:
    """Set all but the k largest of each row to zero. Of equal values, the first ones are kept."""
    kept = values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(values).scatter(1, kept, values.gather(1, kept))


def _batch_topk(values: Tensor, k: int) -> Tensor:
    """Set all but the (rows * k) largest positive values to zero. Ties are broken by latent."""
    flat = _topk(values.relu().T.reshape(1, -1), k * len(values))
    return flat.reshape(-1, len(values)).T


class _JumpReLU(torch.autograd.Function):
    """z H(z - theta), with explicit gradients as in the appendices of SAE papers."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, eps: float, through_z: bool) -> Tensor:  # noqa: FBT001
        ctx.save_for_backward(z, theta)
        ctx.eps, ctx.through_z = eps, through_z
        return z * (z > theta)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        z, theta = ctx.saved_tensors
        kernel = ((z - theta) / ctx.eps).abs() < 0.5
        grad_z = gradient * (z > theta)
        if ctx.through_z:
            grad_z = grad_z + gradient * (theta / ctx.eps) * kernel
        return grad_z, (-(theta / ctx.eps) * kernel * gradient).sum(0), None, None


class _Step(torch.autograd.Function):
    """H(z - theta), the Heaviside step, with a pseudo-gradient for theta."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.eps = eps
        return (z > theta).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        z, theta = ctx.saved_tensors
        kernel = ((z - theta) / ctx.eps).abs() < 0.5
        return None, -(gradient * kernel / ctx.eps).sum(0), None
