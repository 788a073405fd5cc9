"""Sections for crosscoders. The equations are in `dictionaries/recipes/crosscoder.py`."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from dist_sae.config.dictionary import BatchSelectionConfig, DictionaryConfig


class CrosscoderBaseConfig(DictionaryConfig):
    """Settings shared by all crosscoders."""

    weighting: Literal["l2", "l1"] = "l2"
    """Weight of a latent's codes. l2: the norm of its decoder row over all sites. l1: the sum of
    its norms at the sites. With l1 a latent of many sites costs more, so more latents become
    exclusive to one site."""
    shared_latents: float = Field(0.0, ge=0, lt=1)
    """Share of the latents that have the same decoder row at every site. They represent what the
    compared models have in common (Anthropic, February 2025: .04). All sites must have the same
    width."""
    shared_penalty: float = Field(0.15, gt=0, le=1)
    """Cost of a shared latent's code, as a multiple of the cost of any other code."""

    def sites_problem(self, reads: Sequence[str], writes: Sequence[str]) -> str | None:
        if tuple(reads) != tuple(writes):
            return (
                f"{self.kind} reconstructs the sites that it reads; leave sae.writes out, or use "
                f"transcoder"
            )
        if self.shared_latents and len(reads) == 1:
            return "sae.shared_latents needs two sites or more; use 0"
        return None

    def parent_problem(self, parent: Mapping[str, Any]) -> str | None:
        if parent["shared_latents"] == self.shared_latents:
            return None
        return (
            f"shared_latents: {self.shared_latents} cannot start from the weights of "
            f"{parent['shared_latents']}, since other latents would be shared; use the same value"
        )


class CrosscoderConfig(CrosscoderBaseConfig, BatchSelectionConfig):
    """Crosscoder of several sites, with TopK or BatchTopK (Anthropic, October 2024)."""

    kind: Literal["crosscoder"] = "crosscoder"
    selection: Literal["row", "batch"] = "batch"
    """row: keep the `k` largest codes of each row (TopK). batch: keep the largest codes of the
    global batch, `k` per row on average (BatchTopK). Only batch uses `threshold_decay`."""

    @property
    def selects_over_batch(self) -> bool:
        return self.selection == "batch"
