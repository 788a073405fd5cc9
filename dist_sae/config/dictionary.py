"""Base classes for the sections of the recipes (see `sae.py`)."""

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
    """With `init: data`, a row becomes an initial direction if its cosine with every earlier one is
    below this. At 1 every row does."""

    kind: str
    n_latents: PositiveInt
    """Number of latents in the dictionary."""
    dead_after_rows: PositiveInt | None = None
    """A latent counts as dead if it has not fired for this many rows. null: a tenth of train.rows,
    at most 10 million."""
    init: Literal["random", "data"] = "data"
    """Initial directions of the latents. random: random directions. data: near the directions of
    the first rows, one row per latent. With an L1 penalty, a row with a cosine of .5 or more to an
    earlier one is not used, and its latent gets a random direction."""
    reads: Annotated[tuple[Site, ...], Field(min_length=1)] | None = None
    """Sites that the encoder reads. null: `train.site`, or the only site of the activation set."""
    writes: Annotated[tuple[Site, ...], Field(min_length=1)] | None = None
    """Sites that the decoder reconstructs. null: the sites in `reads`."""

    def sites_problem(self, reads: Sequence[str], writes: Sequence[str]) -> str | None:
        """Return why this kind cannot read and write these sites, or None if it can."""
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
        """True if the reconstruction of a site does not depend on sites in later layers."""
        return False

    @property
    def sparsity_key(self) -> str:
        """Name of the setting that decides how many latents are active."""
        return "sparsity"

    @property
    def init_rows(self) -> int:
        """Number of rows that the initial directions are taken from; 0 if they are random."""
        return self.n_latents if self.init == "data" else 0

    @property
    def preacts_per_row(self) -> int:
        """Number of latents whose pre-activations are computed for a row."""
        return self.n_latents

    @property
    def has_skip(self) -> bool:
        """True if a linear map from the inputs adds a part of the reconstruction."""
        return False

    @property
    def n_experts(self) -> int | None:
        """Number of experts, to which rows are routed; None if every row meets all latents."""
        return None

    @property
    def prefix_widths(self) -> tuple[int, ...]:
        """Number of latents in each nested dictionary, ascending; empty if there are none."""
        return ()

    @property
    def group_size(self) -> int:
        """Size of the groups of neighbouring latents that must share a shard and a page."""
        return self.n_latents // (self.n_experts or self.n_latents)

    def can_shard_over(self, shards: int) -> bool:
        """True if shards of equal size can hold the latents without splitting a group."""
        return self.n_latents % (self.group_size * shards) == 0

    def shards_problem(self, shards: int) -> tuple[str, str] | None:  # noqa: ARG002
        """Return the setting that rules out this number of shards, and why, or None."""
        return None

    def parent_problem(self, parent: Mapping[str, Any]) -> str | None:  # noqa: ARG002
        """Return why the latents of a parent of the same kind cannot be taken over, or None.

        Args:
            parent: Settings of the parent.
        """
        return None


class KSelectionConfig(DictionaryConfig):
    """Settings shared by the recipes that keep `k` latents per row."""

    k: PositiveInt
    """Number of active latents per row (for BatchTopK: on average)."""
    k_start: PositiveInt | None = None
    """Value of `k` at the start of training. It is reduced linearly to `k`. null: `k` is
    constant."""
    k_anneal_share: float = Field(0.1, gt=0, le=1)
    """Share of the run over which `k_start` is reduced to `k`."""
    auxk: NonNegativeInt = Field(
        default_factory=lambda known: min(_AUXK, known.get("n_latents", _AUXK))
    )
    """Number of dead latents per row that reconstruct the row's error in the AuxK loss. 0 turns
    AuxK off. The default is 512, or all latents if there are fewer."""
    auxk_coefficient: NonNegativeFloat = 1 / 32
    """Weight of the AuxK loss. With more than Gao et al.'s 1/32 fewer latents die, but FVU is
    worse."""

    @property
    def sparsity_key(self) -> str:
        return "k"

    @property
    def selects_over_batch(self) -> bool:
        """True if `k` is an average over the batch instead of a number for each row."""
        return False

    @model_validator(mode="after")
    def _counts_fit(self) -> Self:
        for name in ("k", "k_start", "auxk"):
            value = getattr(self, name)
            if value is not None and value > self.n_latents:
                raise ValueError(f"{name} ({value}) must not exceed n_latents ({self.n_latents})")
        return self


class BatchSelectionConfig(KSelectionConfig):
    """Settings of recipes that can select over a batch and learn a threshold for inference."""

    threshold_decay: float = Field(0.99, ge=0, lt=1)
    """Decay per step of the running mean of each batch's smallest active code. This mean is the
    threshold at inference."""

    @property
    def selects_over_batch(self) -> bool:
        return True
