"""Sections for cross-layer transcoders."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, Self

from pydantic import model_validator

from dist_sae.config.data import layer_of
from dist_sae.config.dictionary import BatchSelectionConfig, DictionaryConfig


class CrossLayerConfig(DictionaryConfig):
    """Settings of cross-layer transcoders. A latent reads one layer and writes it and later ones.

    `reads` and `writes` name one site per layer, in the order of the layers. If both name the same
    sites, for example of the residual stream, the dictionary is a weakly causal crosscoder.
    """

    init: Literal["random"] = "random"
    """Initial encoder directions. The decoder starts at 0."""

    def sites_problem(self, reads: Sequence[str], writes: Sequence[str]) -> str | None:
        if len(reads) != len(writes):
            return (
                f"{len(reads)} sites are read and {len(writes)} written; name the same number of "
                f"each"
            )
        for sites in (reads, writes):
            if any(layer_of(one) >= layer_of(other) for one, other in pairwise(sites)):
                return f"{', '.join(sites)}: name each layer once, in the order of the layers"
        return None

    @property
    def layers(self) -> int:
        """Number of layers that are read. Latent n reads layer n % layers."""
        return len(self.reads or (None,))

    @property
    def group_size(self) -> int:
        return self.layers

    @property
    def has_latent_rows(self) -> bool:
        return self.layers == 1

    @property
    def is_causal(self) -> bool:
        return True

    def shards_problem(self, shards: int) -> tuple[str, str] | None:
        if self.can_shard_over(shards):
            return None
        return (
            "n_latents",
            f"{self.n_latents} is not a multiple of processes.latent_shards ({shards}) times the "
            f"number of sae.reads ({self.layers}): each shard needs the same number of latents per "
            f"layer",
        )

    def parent_problem(self, parent: Mapping[str, Any]) -> str | None:
        if parent["n_latents"] == self.n_latents:
            return None
        return "kind: cross-layer transcoders cannot be widened; train from scratch"

    @model_validator(mode="after")
    def _latents_fit(self) -> Self:
        if self.n_latents % self.layers:
            raise ValueError(
                f"n_latents ({self.n_latents}) is not a multiple of the number of reads "
                f"({self.layers})"
            )
        return self


class CLTConfig(CrossLayerConfig, BatchSelectionConfig):
    """Cross-layer transcoder with BatchTopK (Anthropic, March 2025; arXiv:2412.06410).

    It is a weakly causal crosscoder if `reads` and `writes` name the same sites.
    """

    kind: Literal["clt"] = "clt"
