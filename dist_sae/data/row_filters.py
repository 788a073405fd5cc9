"""Filters for rows of the activation set, shared by producers and evaluation."""

from collections import Counter
from collections.abc import Set as AbstractSet

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dist_sae.config.data import ExcludeConfig
from dist_sae.data.tokens import TokenBatch


def kept_by_token_rules(
    batch: TokenBatch, special: AbstractSet[int], rules: ExcludeConfig, excluded: Counter[str]
) -> Bool[Tensor, "batch seq"]:
    """Mark the rows that are neither padding nor excluded by a rule about tokens.

    A BOS added at the start of a context is not part of the text and is always excluded.

    Args:
        special: Ids of special tokens.
        rules: Rules of exclusion.
        excluded: Counter to add to. Each excluded row counts once, under the first reason.
    """
    ids = torch.tensor(sorted(special), dtype=batch.tokens.dtype)
    reasons = {
        "padding": ~batch.mask,
        "special_token": torch.isin(batch.tokens, ids)
        if rules.special_tokens
        else batch.positions < 0,
        "first_position": batch.offsets < rules.first_positions,
    }
    keep = torch.ones_like(batch.mask)
    for reason, hit in reasons.items():
        excluded[reason] += int((keep & hit).sum())
        keep &= ~hit
    return keep


def kept_by_norm(
    acts: Float[Tensor, "rows d_in"], over_norm: float | None
) -> Bool[Tensor, " rows"]:
    """Mark the rows with a norm of at most `over_norm` times the median norm."""
    if over_norm is None or not len(acts):
        return torch.ones(len(acts), dtype=torch.bool, device=acts.device)
    norms = torch.linalg.vector_norm(acts, dim=1, dtype=torch.float32)
    usual: Tensor = norms <= over_norm * norms.median()
    return usual
