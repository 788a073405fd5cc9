"""One section per architecture, told apart by `kind`."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from dist_sae.config.base import Section


class TopKConfig(Section):
    """TopK with AuxK (Gao et al. 2024, arXiv:2406.04093)."""

    kind: Literal["topk"] = "topk"
    n_latents: PositiveInt
    """Width of the dictionary."""
    k: PositiveInt
    """Latents kept for each row."""
    auxk: NonNegativeInt = 512
    """Dead latents that reconstruct the error of each row; 0 turns AuxK off."""
    auxk_coefficient: NonNegativeFloat = 1 / 32
    """Weight of the AuxK loss."""
    dead_after_rows: PositiveInt = 10_000_000
    """A latent is dead when it has not fired for this many rows."""

    @model_validator(mode="after")
    def _k_fits(self) -> Self:
        if self.k > self.n_latents:
            raise ValueError(f"k ({self.k}) must not exceed n_latents ({self.n_latents})")
        if self.auxk > self.n_latents:
            raise ValueError(f"auxk ({self.auxk}) must not exceed n_latents ({self.n_latents})")
        return self


SaeConfig = Annotated[TopKConfig, Field(discriminator="kind")]
