"""One section per recipe, told apart by `kind`; the mathematics: `dictionaries/recipes/`."""

import math
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from dist_sae.config.base import Section


class DictionaryConfig(Section):
    """What every recipe has."""

    n_latents: PositiveInt
    """Width of the dictionary."""
    dead_after_rows: PositiveInt | None = None
    """A latent is dead when it has not fired for this many rows; null gives a tenth of train.rows,
    10 million at most."""
    init: Literal["random", "data"] = "data"
    """Initial directions: random, or near those of the first `n_latents` rows."""

    @property
    def init_rows(self) -> int:
        """Rows that initial directions are taken from; 0 where they are random."""
        return self.n_latents if self.init == "data" else 0

    @property
    def latents_met(self) -> int:
        """Latents whose pre-activation is computed for a row."""
        return self.n_latents


class CountsLatentsConfig(DictionaryConfig):
    """What TopK and BatchTopK share."""

    k: PositiveInt
    """Latents kept for each row (BatchTopK: on average)."""
    k_start: PositiveInt | None = None
    """Begin with so many and come down to `k` linearly; null keeps `k` throughout."""
    k_anneal_share: float = Field(0.1, gt=0, le=1)
    """Share of the run over which `k_start` comes down to `k`."""
    auxk: NonNegativeInt = 512
    """Dead latents that reconstruct the error of each row; 0 turns AuxK off."""
    auxk_coefficient: NonNegativeFloat = 1 / 32
    """Weight of the AuxK loss; above Gao et al.'s 1/32 fewer latents idle, and FVU is worse."""

    @model_validator(mode="after")
    def _counts_fit(self) -> Self:
        for name in ("k", "k_start", "auxk"):
            value = getattr(self, name)
            if value is not None and value > self.n_latents:
                raise ValueError(f"{name} ({value}) must not exceed n_latents ({self.n_latents})")
        return self


class TopKConfig(CountsLatentsConfig):
    """TopK with AuxK (Gao et al. 2024, arXiv:2406.04093)."""

    kind: Literal["topk"] = "topk"


class KeepsThresholdConfig(CountsLatentsConfig):
    """What may select over a whole batch."""

    threshold_decay: float = Field(0.99, ge=0, lt=1)
    """Of the running mean of a batch's least code, per step; it is the threshold at inference."""


class BatchTopKConfig(KeepsThresholdConfig):
    """BatchTopK with AuxK (Bussmann et al. 2024, arXiv:2412.06410)."""

    kind: Literal["batchtopk"] = "batchtopk"


class RoutedConfig(KeepsThresholdConfig):
    """Experts, of which a row meets few (Switch SAE, Mudide et al. 2024, arXiv:2410.08201)."""

    kind: Literal["routed"] = "routed"
    selection: Literal["row", "batch"] = "row"
    """Each expert's codes are its `k / experts_per_row` largest (TopK), or those among the `k` per
    row that are largest in the global batch (BatchTopK; only then `threshold_decay` matters)."""
    experts: PositiveInt = 16
    """Equal parts of the latents; a multiple of `processes.latent_shards`."""
    experts_per_row: PositiveInt = 1
    """How many a row is sent to."""
    gate: Literal["straight_through", "probability"] = "straight_through"
    """What an expert's codes are times: its share of the row's chosen p, or p (Mudide et al.)."""
    balance: Literal["loss", "bias"] = "loss"
    """Keeps the experts equally busy: a term of the loss, or a bias where experts are chosen."""
    balance_coefficient: NonNegativeFloat = 0.03
    """Weight of the term."""
    balance_rate: PositiveFloat = 1e-2
    """What the bias of an expert with too few or too many rows changes by in a step."""
    capacity: float | None = Field(None, ge=1)
    """An expert takes at most so many times its even share of a batch; null: all that come.

    What it does not take goes without its part of the reconstruction, and is counted. The share is
    of a replica's rows, so what is trained depends on the number of replicas.
    """

    @property
    def init_rows(self) -> int:
        spare = self.n_latents // 4  # some experts get more rows than others
        return self.n_latents + spare if self.init == "data" else 0

    @property
    def latents_met(self) -> int:
        return self.n_latents // self.experts * self.experts_per_row

    @model_validator(mode="after")
    def _experts_fit(self) -> Self:
        if self.n_latents % self.experts:
            raise ValueError(
                f"n_latents ({self.n_latents}) is not a multiple of experts ({self.experts})"
            )
        if self.experts_per_row > self.experts:
            raise ValueError(
                f"experts_per_row ({self.experts_per_row}) must not exceed experts ({self.experts})"
            )
        met = self.n_latents // self.experts * self.experts_per_row
        for name in ("k", "k_start"):
            value = getattr(self, name)
            if value is not None and self.selection == "row" and value % self.experts_per_row:
                raise ValueError(
                    f"{name} ({value}) is not a multiple of experts_per_row "
                    f"({self.experts_per_row})"
                )
            if value is not None and value > met:
                raise ValueError(f"{name} ({value}) must not exceed the {met} latents a row meets")
        return self


_TANH_COST = 5e-4
_LEAST_COST = 1e-5  # below it nothing follows from lambda
_COST_AT_START = 0.1  # of the latents that are active then, in units of FVU
_L1_AT_START = 0.8  # the same of ReLU; about that of as many orthogonal features


class PenalisedConfig(DictionaryConfig):
    """Settings shared by the recipes that a penalty makes sparse."""

    sparsity_warmup_share: float = Field(0.1, ge=0, le=1)
    """The penalty's coefficient rises linearly from 0 over this first share of the run."""
    initial_l0: PositiveFloat | None = None
    """Active latents per row at the start, at most half of all; null gives so many that the penalty
    on them is a tenth of the variance of the rows (ReLU: eight tenths)."""

    def l0_at_start(self, d_in: int) -> float:
        """`initial_l0`, or what follows from the coefficient and the width of the rows."""
        return self.initial_l0 or _COST_AT_START / max(self.cost(d_in), _LEAST_COST)

    def cost(self, d_in: int) -> float:
        """Penalty on one active latent, in units of FVU."""
        raise NotImplementedError


class JumpReLUConfig(PenalisedConfig):
    """JumpReLU with an L0 penalty (Rajamanoharan et al. 2024, arXiv:2407.14435; Gemma Scope)."""

    kind: Literal["jumprelu"] = "jumprelu"
    sparsity: NonNegativeFloat = 1e-3
    """lambda: what an active latent costs, in units of FVU."""
    initial_threshold: PositiveFloat | None = None
    """In units of the rows' root mean square norm; null gives sqrt(lambda), the least code that
    can explain as much as it costs, times the length of the encoder's rows."""
    bandwidth: PositiveFloat | None = None
    """Width of the window in which a threshold gets a gradient, in the same units; null gives
    sqrt(lambda)."""

    def cost(self, d_in: int) -> float:  # noqa: ARG002 - it is in units of FVU already
        return self.sparsity

    @property
    def least_code(self) -> float:
        """sqrt(lambda), in units of the rows' root mean square norm."""
        return math.sqrt(max(self.sparsity, _LEAST_COST))


class JumpReLUTanhConfig(PenalisedConfig):
    """JumpReLU with tanh and pre-activation penalties (Anthropic, January 2025)."""

    kind: Literal["jumprelu_tanh"] = "jumprelu_tanh"
    sparsity: NonNegativeFloat | None = None
    """lambda_S, at its highest, for rows of squared norm d_in; null gives .0005 d_in, for which a
    latent costs the same share of the variance at any width of the rows (published: 20)."""
    tanh_scale: PositiveFloat = 4.0
    """c."""
    pre_act: NonNegativeFloat = 3e-6
    """lambda_P, which keeps latents alive; 0 turns it off."""
    initial_threshold: PositiveFloat = 0.1
    """Threshold of every latent at the start."""
    bandwidth: PositiveFloat = 2.0
    """Width of the window in which thresholds and pre-activations get a gradient."""

    def cost(self, d_in: int) -> float:
        return _TANH_COST if self.sparsity is None else self.sparsity / d_in


class ReLUConfig(PenalisedConfig):
    """ReLU with an L1 penalty on codes times decoder norms (Anthropic, April 2024)."""

    kind: Literal["relu"] = "relu"
    sparsity: NonNegativeFloat = 5.0
    """lambda, for rows of squared norm d_in."""
    sparsity_warmup_share: float = Field(0.05, ge=0, le=1)
    """As in the other recipes."""
    decoder_norm: PositiveFloat = 1.0
    """Initial norm of the decoder rows."""

    def l0_at_start(self, d_in: int) -> float:
        """The codes of l0 orthogonal features sum to sqrt(l0 d_in)."""
        share = _L1_AT_START / max(self.sparsity, _LEAST_COST)
        return self.initial_l0 or d_in * share * share


SaeConfig = Annotated[
    TopKConfig | BatchTopKConfig | RoutedConfig | JumpReLUConfig | JumpReLUTanhConfig | ReLUConfig,
    Field(discriminator="kind"),
]
