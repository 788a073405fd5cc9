"""Routed dictionaries: a row meets a few experts, not all latents (Switch SAE).

Mudide et al. 2024 (arXiv:2410.08201), with AuxK and without their dense encoder: only the experts
that a row is sent to are computed, on the rank that holds them.

    p     = softmax(W_router (x - b_dec) + b_router)
    e     : the `experts_per_row` largest p, or (balance: bias) of log p + bias
    f_e   = p_e relu(TopK(W_enc_e (x - b_dec) + b_enc_e))
    x_hat = sum_e W_dec_e^T f_e + b_dec
    L     = E|x - x_hat|^2 / Var(x)  +  alpha L_aux  +  beta (E sum_e share_e mean p_e - 1)

share_e is the part of the global batch's rows that goes to e, so the last term is 0 when all get as
many. With one expert p is 1, and this is TopK. AuxK's dead latents see the errors of the rows that
come to their expert, with p held fixed: what they learn is no reason to route elsewhere.

Experts are neighbouring latents, `n_latents / experts` each, so a shard holds whole experts.
"""

from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dist_sae.config.sae import RoutedConfig
from dist_sae.sae.auxk import auxk_loss, rescale_stuck_
from dist_sae.sae.axis import WHOLE, LatentAxis
from dist_sae.sae.base import Codes, Dictionary, LossTerms, Output, Routing, Step, fired
from dist_sae.sae.constraints import normalise_rows_
from dist_sae.sae.init import first_rows, initialise_tied, random_rows
from dist_sae.sae.kernels import Entries, autograd, select
from dist_sae.sae.kernels.keys import NOTHING
from dist_sae.sae.schedules import annealed

_BALANCING_STEPS = 200  # of the initial router, on the first batch
_ROUTER_SEED = 1  # beside the dictionary's


class Route(NamedTuple):
    """Where rows go."""

    p: Float[Tensor, "rows experts"]
    experts: Int[Tensor, "rows chosen"]
    gates: Float[Tensor, "rows chosen"]
    """p of the chosen."""


class Trip:
    """The way of a batch's rows to the ranks that hold their experts, and back.

    Args:
        axis: This rank's place.
        experts: Of this rank's rows, numbered over all shards.
        n_experts: Of all shards.
    """

    def __init__(
        self, axis: LatentAxis, experts: Int[Tensor, "rows chosen"], n_experts: int
    ) -> None:
        flat, per_shard = experts.flatten(), n_experts // axis.shards
        self._axis = axis
        self._chosen = experts.shape[1]
        self._order = flat.argsort(stable=True)  # by expert, and so by shard
        self.load = torch.bincount(flat, minlength=n_experts)
        """How many of this rank's rows go to each expert."""
        counts = axis.exchange_counts(self.load.view(axis.shards, per_shard))
        self._sent = self.load.view(axis.shards, per_shard).sum(1).tolist()
        self._received = counts.sum(1).tolist()
        self.arrived: list[int] = counts.sum(0).tolist()
        """Rows of the replica at each expert of this shard."""
        numbers = torch.arange(per_shard, device=flat.device).repeat(axis.shards)
        # they arrive by rank, then by expert
        self._by_expert = numbers.repeat_interleave(counts.flatten()).argsort(stable=True)

    def there(self, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "arrived d_in"]:
        """Rows at this shard's experts, one expert after the other; no gradient."""
        sent = x.index_select(0, self._order // self._chosen)
        return self._axis.exchange(sent, self._sent, self._received)[self._by_expert]

    def back(self, parts: Float[Tensor, "arrived d_in"]) -> Float[Tensor, "rows chosen d_in"]:
        """What experts made of this rank's rows; its gradient goes there."""
        returned = self._axis.exchange(
            parts[_inverse(self._by_expert)], self._received, self._sent
        )
        return returned[_inverse(self._order)].unflatten(0, (-1, self._chosen))


class Routed(Dictionary):
    """The dictionary and its loss."""

    config: RoutedConfig
    balance: Float[Tensor, " experts"]
    """Added to log p where experts are chosen; only balancing by bias changes it."""
    shared = ("b_dec", "W_router", "b_router")

    def __init__(self, config: RoutedConfig, d_in: int, *place: Any, **precision: Any) -> None:
        super().__init__(config, d_in, *place, **precision)
        self.W_router = nn.Parameter(self.b_dec.new_zeros(config.experts, d_in))
        self.b_router = nn.Parameter(self.b_dec.new_zeros(config.experts))
        self.register_buffer("balance", self.b_dec.new_zeros(config.experts))

    @cached_property
    def width(self) -> int:
        """Latents of an expert."""
        return self.n_latents // self.config.experts

    def route(self, x: Float[Tensor, "rows d_in"], axis: LatentAxis = WHOLE) -> Route:
        """Choose each row's experts; with the replica's axis, gradients are of all its rows."""
        centred = x - self.b_dec.detach()
        logits = centred @ axis.replicated(self.W_router).T + axis.replicated(self.b_router)
        p = logits.softmax(1)
        experts = (p.detach().log() + self.balance).topk(self.config.experts_per_row, dim=1).indices
        return Route(p, experts, p.gather(1, experts))

    def objective(self, x: Float[Tensor, "batch d_in"], step: Step) -> Output:
        config, axis = self.config, self.axis
        k = annealed(step.progress, config.k, config.k_start, config.k_anneal_share)
        b_dec = axis.replicated(self.b_dec)
        route = self.route(x, axis)
        trip = Trip(axis, route.experts, config.experts)
        rows = trip.there((x - b_dec).detach())

        pre_acts, entries = self._expert_entries(rows, trip.arrived, k)
        pre_acts = autograd.encode(
            pre_acts, self.kernels, entries, rows, self.W_enc, self.b_enc, b_dec
        )
        acts = pre_acts.relu()
        parts = autograd.decode(acts, self.kernels, entries, self.W_dec, unit_rows=True)
        x_hat = (route.gates[:, :, None] * trip.back(parts)).sum(1) + b_dec
        error = x - x_hat

        def reconstruct_error(dead: Tensor) -> Tensor:
            pre_acts, entries = self._expert_entries(rows, trip.arrived, config.auxk, among=dead)
            pre_acts = autograd.encode(
                pre_acts, self.kernels, entries, rows, self.W_enc, self.b_enc, b_dec
            )
            parts = autograd.decode(
                pre_acts.relu(), self.kernels, entries, self.W_dec, unit_rows=True
            )
            return (route.gates.detach()[:, :, None] * trip.back(parts)).sum(1)

        replica_rows = len(x) * axis.shards
        fvu = error.square().sum() / (replica_rows * step.variance)
        auxk = fvu.new_zeros(())
        if config.auxk:
            auxk = auxk_loss(axis, error.detach(), step, reconstruct_error)
        load = axis.total(trip.load).to(x.dtype)
        imbalance = config.experts * (load / load.sum() * route.p.sum(0)).sum()
        imbalance = (imbalance - len(x)) / replica_rows
        coefficient = config.balance_coefficient if config.balance == "loss" else 0.0
        penalty = coefficient * imbalance
        if config.balance == "bias" and self.training:
            self.balance += config.balance_rate * (load.mean() - load).sign()
        total = fvu + config.auxk_coefficient * auxk + penalty
        dropped = sum(max(0, n - self._capacity(rows)) for n in trip.arrived)
        return Output(
            LossTerms(fvu, auxk, penalty, total),
            fired(acts, entries),
            (acts > 0).sum(),
            error.detach(),
            Routing(load, torch.tensor(dropped, device=x.device)),
        )

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "batch d_in"]) -> Codes:
        """Every shard looks at all of the replica's rows, and computes those that come to it."""
        rows = self.axis.gather(x)
        route = self.route(rows)
        here = route.experts.flatten() - self.first_latent // self.width
        order = here.argsort(stable=True)
        local = len(self.W_enc) // self.width
        counts = torch.bincount(here[(here >= 0) & (here < local)], minlength=local).tolist()
        first = int((here < 0).sum())
        order = order[first : first + sum(counts)]
        chosen = order // self.config.experts_per_row
        pre_acts, entries = self._expert_entries(
            (rows - self.b_dec)[chosen],
            counts,
            self.config.k,
            product_dtype=self.W_enc.dtype,
            limited=False,
        )
        acts = pre_acts.relu() * route.gates.flatten()[order][entries.rows]
        found = select.by_row(select.Candidates(acts, chosen[entries.rows], entries.latents))
        return Codes(found.values, found.latents, select.starts_of(found.rows, len(rows)))

    def initialise(self, x: Float[Tensor, "batch d_in"], seed: int) -> None:
        """Random directions, and a router that spreads these rows evenly."""
        random_rows(self.W_router.data, seed + _ROUTER_SEED, 0)
        self.W_router.data.mul_(len(self.b_dec) ** -0.5)
        initialise_tied(self, x, seed, rescale=False)
        self._spread(x)
        if self.config.init == "random":
            self.rescale(x)
