"""The section for Matryoshka dictionaries. The equations are in `recipes/matryoshka.py`."""

import math
from bisect import bisect_right
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from dist_sae.config.dictionary import BatchSelectionConfig


class MatryoshkaConfig(BatchSelectionConfig):
    """Matryoshka: BatchTopK with nested dictionaries (Bussmann et al. 2025, arXiv:2503.17547)."""

    kind: Literal["matryoshka"] = "matryoshka"
    prefixes: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (
        1 / 32,
        3 / 32,
        7 / 32,
        15 / 32,
        1.0,
    )
    """Sizes of the nested dictionaries, ascending. They are shares of `n_latents` if the last one
    is at most 1, and numbers of latents otherwise. The whole dictionary is added if it is missing.
    Every size must be a multiple of `processes.latent_shards`."""
    prefix_weights: tuple[NonNegativeFloat, ...] | None = None
    """Weight of each nested dictionary's squared error in the loss, the whole dictionary's last.
    null: 1 for each."""

    @property
    def _unit(self) -> int:
        """Number of latents that 1 stands for in `prefixes`: all for shares, else one."""
        return self.n_latents if self.prefixes[-1] <= 1 else 1

    @property
    def prefix_widths(self) -> tuple[int, ...]:
        widths = [round(prefix * self._unit) for prefix in self.prefixes]
        return tuple(widths) if widths[-1] == self.n_latents else (*widths, self.n_latents)

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of each nested dictionary's squared error in the loss."""
        return self.prefix_weights or (1.0,) * len(self.prefix_widths)

    @property
    def prefix_pattern(self) -> tuple[int, ...]:
        """Number of latents of each prefix in a block of neighbours; the last is the block's size.

        All blocks have the same pattern, so each prefix is spread evenly over the latents. It is
        spread evenly over n equal shards if its width is a multiple of n.
        """
        periods = math.gcd(*self.prefix_widths)
        return tuple(width // periods for width in self.prefix_widths)

    def prefix_of(self, latent: int) -> int:
        """Return the index, from 0, of the smallest prefix that contains a latent."""
        pattern = self.prefix_pattern
        return bisect_right(pattern, latent % pattern[-1])

    def shards_problem(self, shards: int) -> tuple[str, str] | None:
        bad = [width for width in self.prefix_widths if width % shards]
        if not bad:
            return None
        return (
            "prefixes",
            f"{bad[0]} latents are not a multiple of processes.latent_shards ({shards}): each "
            f"shard needs an equal part of every prefix",
        )

    def parent_problem(self, parent: Mapping[str, Any]) -> str | None:
        if MatryoshkaConfig.model_validate(parent).prefix_pattern == self.prefix_pattern:
            return None
        return (
            "prefixes: must be the same shares of n_latents, or latents would change their prefix"
        )

    @model_validator(mode="after")
    def _prefixes_fit(self) -> Self:
        for prefix in self.prefixes:
            latents = prefix * self._unit
            if not math.isclose(latents, round(latents), rel_tol=1e-9):
                raise ValueError(
                    f"prefixes: {prefix:g} of n_latents ({self.n_latents}) is {latents:g} latents; "
                    f"give shares that make whole numbers, or numbers of latents"
                )
        widths = self.prefix_widths
        if any(one >= other for one, other in pairwise(widths)):
            raise ValueError(
                f"prefixes: {', '.join(map(str, widths))} latents do not increase up to n_latents "
                f"({self.n_latents})"
            )
        if self.prefix_weights is not None and len(self.prefix_weights) != len(widths):
            raise ValueError(
                f"prefix_weights: {len(self.prefix_weights)} given for {len(widths)} prefixes, "
                f"including the whole dictionary"
            )
        return self
