"""Bytes that a trainer rank sends in a step, by collective (see `distributed.axis`)."""

import torch

from dist_sae.config.dictionary import KSelectionConfig
from dist_sae.config.sae import TopKConfig
from dist_sae.dictionaries import build_sae
from dist_sae.distributed.gradients import Exchange, is_summed_by_entry
from dist_sae.distributed.zero import deepspeed_config
from dist_sae.planning.sizes import RunSizes

_FP32, _INT64 = 4, 8
_DIGITS = 3  # rounds in which a selection over the batch finds its threshold, 2,048 counts each
_COUNTS = 2048


def step_traffic(sizes: RunSizes) -> dict[str, int]:
    """Return the bytes that a rank sends in a step without dead latents, by collective.

    Assumes rings of n ranks: an all-gather or reduce-scatter sends (n - 1) / n of the whole tensor,
    an all-reduce twice that. Also assumes that active latents are spread evenly over shards.
    Collectives of a few bytes (norms, counts of dead latents) are left out.
    """
    run, sae = sizes.run, sizes.run.sae
    shards, replicas = sizes.axis.shards, sizes.axis.replicas
    rows, own = sizes.replica_rows, sizes.rank_rows
    d_in, d_out = sizes.widths.d_in, sizes.widths.d_out
    within, across, all_ranks = (1 - 1 / n for n in (shards, replicas, shards * replicas))
    moved: dict[str, float] = {}
    if sae.n_experts:
        chosen = own * round(sae.preacts_per_row * sae.n_experts / sae.n_latents)
        moved["dispatch_rows"] = within * chosen * d_in * _FP32
        moved["combine_rows"] = 2 * within * chosen * d_out * _FP32  # gradients go back
    else:
        moved["gather_inputs"] = within * rows * d_in * _FP32
        moved["scatter_outputs"] = within * rows * d_out * _FP32
        moved["gather_gradients"] = within * rows * d_out * _FP32
    if isinstance(sae, KSelectionConfig):
        if sae.selects_over_batch:
            moved["select"] = 2 * all_ranks * _DIGITS * _COUNTS * _INT64
        elif not sae.n_experts:
            moved["select"] = within * (rows * sae.k + rows) * _INT64
    weights = sizes.state.weights
    if deepspeed_config(run)["zero_optimization"]["stage"]:
        moved["zero_gradients_and_weights"] = 2 * across * weights
    else:
        moved |= _gradients_over_replicas(sizes, weights)
    moved["fired_latents"] = 2 * across * _FP32 * sae.n_latents / shards
    return {name: round(size) for name, size in moved.items()}


def _gradients_over_replicas(sizes: RunSizes, weights: int) -> dict[str, float]:
    """Return the bytes of gradients that a rank sends to the other replicas of its shard.

    Gradients of W_enc and W_dec are sent as sparse entries if that is less.

    Args:
        sizes: The run.
        weights: Bytes of all weights of a rank.
    """
    sae, axis = sizes.run.sae, sizes.axis
    moved = {"gather_entries": 0.0, "sum_gradients": 2 * (1 - 1 / axis.replicas) * weights}
    if not is_summed_by_entry(sae):
        return moved
    assert isinstance(sae, KSelectionConfig)
    with torch.device("meta"):
        shard = build_sae(sae, sizes.widths, axis)
    multi = sae.multi_factor if isinstance(sae, TopKConfig) and sae.multi_factor else 1
    nested = len(sae.prefix_widths) or (2 if multi > 1 else 1)
    rows, entries = sizes.replica_rows, sizes.replica_rows * sae.k * multi / axis.shards
    # a latent of a cross-layer transcoder writes its layer and all later ones
    written = entries * (shard.layers + 1) / 2
    for weight, of_row, n in (
        (shard.W_enc, sizes.widths.d_in, entries),
        (shard.W_dec, nested * sizes.widths.d_out, written),
    ):
        exchange = Exchange.of(axis.replicas, weight.numel(), rows * of_row, n, _FP32)
        if exchange.is_by_entry:
            moved["gather_entries"] += exchange.by_entry
            moved["sum_gradients"] -= exchange.dense
    return moved


def auxk_traffic(sizes: RunSizes) -> int:
    """Return the bytes that a rank also sends while latents are dead, if the recipe has AuxK."""
    sae = sizes.run.sae
    if not isinstance(sae, KSelectionConfig) or not sae.auxk:
        return 0
    within = 1 - 1 / sizes.axis.shards
    select = 0 if sae.n_experts else sizes.replica_rows * (sae.auxk + 1) * _INT64
    outputs = 2 * (sizes.rank_rows if sae.n_experts else sizes.replica_rows) * sizes.widths.d_out
    return round(within * (select + outputs * _FP32))
