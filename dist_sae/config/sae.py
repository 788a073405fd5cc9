"""Sections for the recipes, one per `kind`. The equations are in `dictionaries/recipes/`."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from dist_sae.config.clt import CLTConfig, CrossLayerConfig
from dist_sae.config.crosscoder import CrosscoderBaseConfig, CrosscoderConfig
from dist_sae.config.dictionary import (
    BatchSelectionConfig,
    DictionaryConfig,
    KSelectionConfig,
)
from dist_sae.config.matryoshka import MatryoshkaConfig
from dist_sae.config.transcoder import TranscoderConfig


class TopKConfig(KSelectionConfig):
    """TopK with AuxK (Gao et al. 2024, arXiv:2406.04093)."""

    kind: Literal["topk"] = "topk"
    multi_factor: int | None = Field(None, ge=2)
    """Multi-TopK: also train the reconstruction from the `multi_factor * k` largest codes of a row,
    so that the dictionary can be used with more latents than `k`. The published value is 4. null:
    off."""
    multi_weight: NonNegativeFloat = 1 / 8
    """Weight of Multi-TopK's squared error in the loss."""

    @model_validator(mode="after")
    def _multiple_fits(self) -> Self:
        k = max(self.k, self.k_start or 0)
        if self.multi_factor and self.multi_factor * k > self.n_latents:
            raise ValueError(
                f"multi_factor ({self.multi_factor}) times k ({k}) must not exceed n_latents "
                f"({self.n_latents})"
            )
        return self


class BatchTopKConfig(BatchSelectionConfig):
    """BatchTopK with AuxK (Bussmann et al. 2024, arXiv:2412.06410)."""

    kind: Literal["batchtopk"] = "batchtopk"


class RoutedConfig(BatchSelectionConfig):
    """Routed experts: each row uses a few (Switch SAE, Mudide et al. 2024, arXiv:2410.08201)."""

    kind: Literal["routed"] = "routed"
    selection: Literal["row", "batch"] = "row"
    """row: each expert keeps its `k / experts_per_row` largest codes of a row (TopK). batch: keep
    the largest codes of the global batch, `k` per row on average (BatchTopK). Only batch uses
    `threshold_decay`."""
    experts: PositiveInt = 16
    """Number of experts, which are equal parts of the latents. Must be a multiple of
    `processes.latent_shards`."""
    experts_per_row: PositiveInt = 1
    """Number of experts that each row is sent to."""
    gate: Literal["straight_through", "probability"] = "straight_through"
    """Factor that multiplies an expert's codes. probability: its router probability p (Mudide et
    al.). straight_through: p divided by the sum of p over the chosen experts. No gradient flows
    through this sum."""
    balance: Literal["loss", "bias"] = "loss"
    """Method that keeps experts equally busy. loss: a loss term. bias: a bias on the choice of
    experts."""
    balance_coefficient: NonNegativeFloat = 0.03
    """Weight of the balance loss."""
    balance_rate: PositiveFloat = 1e-2
    """Change per step of the bias of an expert that gets too few or too many rows."""
    capacity: float | None = Field(None, ge=1)
    """Maximum rows per expert, as a multiple of its even share of a batch. null: no limit.

    Rows above the limit get no reconstruction from that expert, and are counted. The share is of a
    replica's rows, so the result depends on the number of replicas.
    """

    @property
    def selects_over_batch(self) -> bool:
        return self.selection == "batch"

    @property
    def init_rows(self) -> int:
        spare = self.n_latents // 4  # experts get unequal numbers of rows
        return self.n_latents + spare if self.init == "data" else 0

    @property
    def preacts_per_row(self) -> int:
        return self.n_latents // self.experts * self.experts_per_row

    @property
    def n_experts(self) -> int:
        return self.experts

    def shards_problem(self, shards: int) -> tuple[str, str] | None:
        if self.experts % shards == 0:
            return None
        return (
            "experts",
            f"{self.experts} is not a multiple of processes.latent_shards ({shards}): "
            f"each shard needs whole experts",
        )

    def parent_problem(self, parent: Mapping[str, Any]) -> str | None:
        if (parent["n_latents"], parent["experts"]) == (self.n_latents, self.experts):
            return None
        return (
            "kind: routed dictionaries cannot be widened, since latents would change their "
            "experts; train from scratch"
        )

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
                raise ValueError(
                    f"{name} ({value}) must not exceed the {met} latents of a row's experts"
                )
        return self


_JUMP_COST = 2e-3  # default penalty per active latent, in units of FVU; .001 leaves L0 far too high
_COST_AT_TARGET = (
    0.05  # penalty on the latents of `target_l0`, in units of FVU; about what is needed
)
_OLD_TANH_COST = 5e-4
_LEAST_COST = 1e-5  # a smaller lambda gives no useful initial values
_COST_AT_START = 0.1  # penalty on all initially active latents, in units of FVU
_L1_AT_START = 0.8  # the same for an L1 penalty; about its value for that many orthogonal features


class PenalisedConfig(DictionaryConfig):
    """Settings shared by recipes with a sparsity penalty."""

    sparsity_warmup_share: float = Field(0.1, ge=0, le=1)
    """Share of the run, from its start, over which the penalty's coefficient rises linearly from
    0."""
    initial_l0: PositiveFloat | None = None
    """Number of active latents per row at the start, at most half of all latents. null: twice
    `target_l0`, or without it the number whose penalty is a tenth of the rows' variance (with an L1
    penalty: eight tenths)."""

    def l0_at_start(self, d_in: int) -> float:
        """Return `initial_l0`, or derive it from the coefficient and the width of the rows."""
        return self.initial_l0 or _COST_AT_START / max(self.cost(d_in), _LEAST_COST)

    def cost(self, d_in: int) -> float:
        """Return the penalty per active latent, in units of FVU."""
        raise NotImplementedError


class JumpReLUConfig(PenalisedConfig):
    """JumpReLU with an L0 penalty (Rajamanoharan et al. 2024, arXiv:2407.14435; Gemma Scope)."""

    kind: Literal["jumprelu"] = "jumprelu"
    sparsity: NonNegativeFloat | None = None
    """lambda, the penalty per active latent in units of FVU. null: .002, unless `target_l0` is
    set."""
    target_l0: PositiveFloat | None = None
    """Number of active latents per row to reach at the end of the run. Use it instead of
    `sparsity`."""
    sparsity_warmup_share: float = Field(0.1, ge=0, le=1)
    """Share of the run, from its start, over which the penalty's coefficient rises linearly from 0.
    With `target_l0`, the desired L0 moves linearly from `initial_l0` to the target instead."""
    initial_threshold: PositiveFloat | None = None
    """Initial threshold, in units of the rows' root mean square norm. null: sqrt(lambda) times the
    length of the encoder's rows. A code below sqrt(lambda) cannot explain as much as it costs."""
    bandwidth: PositiveFloat | None = None
    """Width of the window in which a threshold gets a gradient, in the same units. null:
    sqrt(lambda)."""

    @property
    def sparsity_key(self) -> str:
        return "sparsity" if self.target_l0 is None else "target_l0"

    @property
    def coefficient(self) -> float:
        """`sparsity` or its default; with `target_l0`, an estimate of lambda at the target."""
        if self.target_l0 is not None:
            return _COST_AT_TARGET / self.target_l0
        return _JUMP_COST if self.sparsity is None else self.sparsity

    def cost(self, d_in: int) -> float:  # noqa: ARG002 - it is in units of FVU already
        return self.coefficient

    @property
    def least_code(self) -> float:
        """sqrt(lambda), in units of the rows' root mean square norm."""
        return math.sqrt(max(self.coefficient, _LEAST_COST))

    @model_validator(mode="after")
    def _target_fits(self) -> Self:
        if self.target_l0 is None:
            return self
        if self.sparsity is not None:
            raise ValueError("target_l0 and sparsity exclude each other; leave one of them out")
        if self.target_l0 > self.n_latents:
            raise ValueError(
                f"target_l0 ({self.target_l0:g}) must not exceed n_latents ({self.n_latents})"
            )
        return self


class JumpReLUTanhConfig(PenalisedConfig):
    """JumpReLU with tanh and pre-activation penalties (Anthropic, January 2025)."""

    kind: Literal["jumprelu_tanh"] = "jumprelu_tanh"
    sparsity: NonNegativeFloat | Literal["auto"] | None = "auto"
    """Final lambda_S, for rows of squared norm d_in (published: 20). auto: .002 d_in, so that an
    active latent costs the same share of the variance at any d_in. null: .0005 d_in, the default of
    older runs."""
    tanh_scale: PositiveFloat = 4.0
    """c, the factor that multiplies codes inside the tanh penalty."""
    pre_act: NonNegativeFloat = 3e-6
    """lambda_P, the coefficient of the pre-activation penalty, which keeps latents alive. 0:
    off."""
    initial_threshold: PositiveFloat = 0.1
    """Initial threshold of every latent."""
    bandwidth: PositiveFloat = 2.0
    """Width of the window in which thresholds and pre-activations get a gradient."""

    def cost(self, d_in: int) -> float:
        if self.sparsity is None:
            return _OLD_TANH_COST
        return _JUMP_COST if self.sparsity == "auto" else self.sparsity / d_in


class L1Config(PenalisedConfig):
    """Settings of recipes with an L1 penalty."""

    reconstructions: ClassVar[int] = 1
    """Number of reconstruction errors in the loss, which the penalty competes with."""
    init_cosine: ClassVar[float] = 0.5  # the penalty does not separate latents that start equal

    sparsity: NonNegativeFloat = 5.0
    """lambda, the L1 coefficient, for rows of squared norm d_in."""
    sparsity_warmup_share: float = Field(0.05, ge=0, le=1)
    """Share of the run, from its start, over which the penalty's coefficient rises linearly from
    0."""

    def l0_at_start(self, d_in: int) -> float:
        """Return or derive `initial_l0`: codes of l0 orthogonal features sum to sqrt(l0 d_in)."""
        share = self.reconstructions * _L1_AT_START / max(self.sparsity, _LEAST_COST)
        return self.initial_l0 or d_in * share * share


class ReLUConfig(L1Config):
    """ReLU with an L1 penalty on codes times decoder norms (Anthropic, April 2024)."""

    kind: Literal["relu"] = "relu"
    decoder_norm: PositiveFloat = 1.0
    """Initial norm of the decoder rows."""


class GatedConfig(L1Config):
    """Gated SAE with an L1 penalty on the gates (Rajamanoharan et al. 2024, arXiv:2404.16014)."""

    reconstructions: ClassVar[int] = 2

    kind: Literal["gated"] = "gated"
    sparsity: NonNegativeFloat = 10.0
    """lambda, the L1 coefficient, for rows of squared norm d_in. It should be about twice that of
    relu, because two reconstruction errors compete with it."""


class CLTJumpReLUConfig(CrossLayerConfig, JumpReLUConfig):
    """Cross-layer transcoder with JumpReLU and an L0 penalty (Anthropic, March 2025)."""

    kind: Literal["clt_jumprelu"] = "clt_jumprelu"  # type: ignore[assignment]


class CrosscoderReLUConfig(CrosscoderBaseConfig, ReLUConfig):
    """Crosscoder of several sites, with ReLU and an L1 penalty (Anthropic, October 2024)."""

    kind: Literal["crosscoder_relu"] = "crosscoder_relu"  # type: ignore[assignment]


SaeConfig = Annotated[
    TopKConfig
    | BatchTopKConfig
    | MatryoshkaConfig
    | RoutedConfig
    | TranscoderConfig
    | CrosscoderConfig
    | CrosscoderReLUConfig
    | JumpReLUConfig
    | JumpReLUTanhConfig
    | ReLUConfig
    | GatedConfig
    | CLTConfig
    | CLTJumpReLUConfig,
    Field(discriminator="kind"),
]
