"""Bases of the sections of the recipes (`sae.py`)."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from dist_sae.config.base import Section
from dist_sae.config.data import Site

_AUXK = 512


class DictionaryConfig(Section):
    """Settings of every recipe."""

    init_cosine: ClassVar[float] = 1.0
    """A row gives an initial direction if its cosine with those that gave one before is lower; at 1
    every row does."""

    kind: str
    n_latents: PositiveInt
    """Number of latents in the dictionary."""
    dead_after_rows: PositiveInt | None = None
    """Rows without firing after which a latent is dead; null gives a tenth of train.rows, at most
    10 million."""
    init: Literal["random", "data"] = "data"
    """Initial directions: random, or near those of the first `n_latents` rows. With an L1 penalty a
    row at a cosine of .5 or more with an earlier one gives none, and its latent's is random."""
    reads: Annotated[tuple[Site, ...], Field(min_length=1)] | None = None
    """Sites that the encoder reads; null reads `train.site`, or the only one there is."""
    writes: Annotated[tuple[Site, ...], Field(min_length=1)] | None = None
    """Sites that the decoder reconstructs; null reconstructs the sites that are read."""

    def sites_problem(self, reads: Sequence[str], writes: Sequence[str]) -> str | None:
        """Why a dictionary of this kind cannot read and write these sites; None if it can."""
        if len(reads) == 1 and tuple(reads) == tuple(writes):
            return None
        return (
            f"{self.kind} reconstructs the one site that it reads; "
            f"use transcoder, crosscoder or clt for others"
        )

    @property
    def has_latent_rows(self) -> bool:
        """True if row i of W_dec is all that latent i writes, so that rows can be compared."""
        return True

    @property
    def is_causal(self) -> bool:
        """True if what is written at a site depends on no site that the model reaches later."""
        return False

    @property
    def sparsity_key(self) -> str:
        """The setting that decides how many latents are active."""
        return "sparsity"

    @property
    def init_rows(self) -> int:
        """Rows from which initial directions are taken; 0 if they are random."""
        return self.n_latents if self.init == "data" else 0

    @property
    def latents_met(self) -> int:
        """Latents whose pre-activations are computed for a row."""
        return self.n_latents

    @property
    def skips(self) -> bool:
        """True if a part of the reconstruction comes straight from what is read."""
        return False

    @property
    def n_experts(self) -> int | None:
        """Equal parts of the latents that rows are routed to; None: every row meets all latents."""
        return None

    @property
    def prefix_widths(self) -> tuple[int, ...]:
        """Latents of each nested dictionary, ascending; none if latents are not nested."""
        return ()

    @property
    def together(self) -> int:
        """Neighbouring latents that lie on one shard, and on one page."""
        return self.n_latents // (self.n_experts or self.n_latents)

    def divides_over(self, shards: int) -> bool:
        """True if shards of equal size can hold the latents, with those that stay together."""
        return self.n_latents % (self.together * shards) == 0

    def shards_problem(self, shards: int) -> tuple[str, str] | None:  # noqa: ARG002
        """The setting that keeps shards of equal size from training, and why; None if they can."""
        return None

    def parent_problem(self, parent: Mapping[str, Any]) -> str | None:  # noqa: ARG002
        """Why latents of a dictionary of the same kind with these settings cannot be taken over.

        None if they can.
        """
        return None


class CountsLatentsConfig(DictionaryConfig):
    """Settings shared by TopK, BatchTopK, Matryoshka and routed dictionaries."""

    k: PositiveInt
    """Latents kept for each row (BatchTopK: on average)."""
    k_start: PositiveInt | None = None
    """Value of `k` at the start, reduced linearly to `k`; null keeps `k` constant."""
    k_anneal_share: float = Field(0.1, gt=0, le=1)
    """Share of the run over which `k_start` is reduced to `k`."""
    auxk: NonNegativeInt = Field(
        default_factory=lambda known: min(_AUXK, known.get("n_latents", _AUXK))
    )
    """Dead latents per row that reconstruct its error; 0 turns AuxK off. By default 512, or all
    latents if they are fewer."""
    auxk_coefficient: NonNegativeFloat = 1 / 32
    """Weight of the AuxK loss; above Gao et al.'s 1/32 fewer latents die, but FVU is worse."""

    @property
    def sparsity_key(self) -> str:
        return "k"

    @property
    def over_batch(self) -> bool:
        """True if the largest codes of a whole batch are kept, and not those of each row."""
        return False

    @model_validator(mode="after")
    def _counts_fit(self) -> Self:
        for name in ("k", "k_start", "auxk"):
            value = getattr(self, name)
            if value is not None and value > self.n_latents:
                raise ValueError(f"{name} ({value}) must not exceed n_latents ({self.n_latents})")
        return self


class KeepsThresholdConfig(CountsLatentsConfig):
    """Settings of recipes that select over a batch, and keep a threshold for inference."""

    threshold_decay: float = Field(0.99, ge=0, lt=1)
    """Decay per step of the running mean of a batch's smallest code, the threshold at inference."""

    @property
    def over_batch(self) -> bool:
        return True
