"""Metrics of a training step over all ranks. All functions here are collective."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dist_sae.dictionaries.axis import LatentAxis
from dist_sae.dictionaries.interface import Output
from dist_sae.dictionaries.normaliser import SiteNormalisers
from dist_sae.telemetry.metric import QUANTILES

_FAR_ABOVE_EPS = 10


def batch_numbers(
    axis: LatentAxis,
    output: Output,
    targets: Float[Tensor, "batch d_out"],
    mean: Float[Tensor, " d_out"],
) -> tuple[dict[str, float], dict[str, float]]:
    """Compute losses and counts of the last batch, and quantiles of its rows' explained variance.

    Args:
        axis: This rank's place among shards and replicas.
        output: The objective's output on the batch.
        targets: This rank's targets in the batch, normalized.
        mean: Mean of the targets over the data set, in the same scale.
    """
    terms = output.terms
    active = targets.new_zeros(axis.shards)
    active[axis.shard] = output.active / (len(targets) * axis.shards)
    centred = targets - mean.to(targets)
    explained = 1 - output.error.square().sum(1) / centred.square().sum(1)
    wanted = targets.new_tensor([float(q) for q in QUANTILES])
    losses = torch.stack([terms.fvu, terms.auxk, terms.sparsity, terms.total]).detach()
    quantiles = explained.quantile(wanted) / axis.shards
    local = torch.cat([losses, active, quantiles])  # one collective, and one wait for the GPU
    values = (axis.total(local) / axis.replicas).tolist()
    fvu, auxk, sparsity, loss = values[:4]
    by_shard, of_rows = values[4 : 4 + axis.shards], values[4 + axis.shards :]
    numbers = {
        "fvu": fvu,
        "loss": loss,
        "auxk_loss": auxk,
        "sparsity_loss": sparsity,
        "l0_latents": sum(by_shard),
        "shard_load_ratio": max(by_shard) * axis.shards / (sum(by_shard) or 1.0),
    }
    return numbers, dict(zip(QUANTILES, of_rows, strict=True))


def prefix_fvus(axis: LatentAxis, output: Output, widths: Sequence[int]) -> dict[str, float]:
    """Compute the FVU of each nested dictionary on the last batch, by its number of latents."""
    values = (axis.total(torch.stack(list(output.prefix_fvu)).detach()) / axis.replicas).tolist()
    return dict(zip(map(str, widths), values, strict=True))


def site_fvus(
    axis: LatentAxis, error: Float[Tensor, "batch d_out"], normalisers: SiteNormalisers
) -> dict[str, float]:
    """Compute the FVU of each written site on the last batch.

    Args:
        axis: This rank's place among shards and replicas.
        error: targets - x_hat of this rank's rows.
        normalisers: Variances and columns of the sites.
    """
    local = torch.stack(
        [
            error[:, columns].square().sum() / normalisers.by_site[site].variance
            for site, columns in normalisers.columns.items()
        ]
    )
    replica_rows = len(error) * axis.shards
    values = (axis.total(local) / (axis.replicas * replica_rows)).tolist()
    return dict(zip(normalisers.writes, values, strict=True))


def starved_share(
    axis: LatentAxis, second_moment: Float[Tensor, "n_local d_in"], eps: float
) -> float:
    """Compute the share of latents whose encoder rows get Adam updates dominated by eps."""
    starved = (second_moment.mean(dim=1).sqrt() < _FAR_ABOVE_EPS * eps).sum()
    return int(axis.total(starved)) / (axis.replicas * axis.shards * len(second_moment))


def expert_numbers(
    axis: LatentAxis, load: Int[Tensor, " experts"], dead: Bool[Tensor, " n_local"]
) -> tuple[dict[str, float], list[int]]:
    """Compute the experts' load balance and worst dead share, and list the experts with no rows.

    Args:
        axis: This rank's place among shards and replicas.
        load: Rows of the global batches sent to each expert.
        dead: Dead latents of this shard.
    """
    here = dead.view(len(load) // axis.shards, -1).double().mean(1)
    shares = here.new_zeros(len(load))
    shares[axis.shard * len(here) :][: len(here)] = here
    idle: list[int] = (load == 0).nonzero()[:, 0].tolist()
    numbers = {
        "expert_load_ratio": float(load.max() / load.double().mean()),
        "idle_experts": float(len(idle)),
        "expert_dead_share": float(axis.total(shares).max()) / axis.replicas,
    }
    return numbers, idle
