"""Routed dictionaries: a row meets a few experts, not all latents (Switch SAE).

Mudide et al. 2024 (arXiv:2410.08201), with AuxK and without their dense encoder: only the experts
that a row is sent to are computed, on the rank that holds them.

    p     = softmax(W_router (x - b_dec) + b_router)
    e     : the `experts_per_row` largest p, or (balance: bias) of log p + bias
    g_e   = p_e / stop_gradient(sum of the row's chosen p),  or (gate: probability) p_e
    f_e   = g_e relu(TopK(W_enc_e (x - b_dec) + b_enc_e))
    x_hat = sum_e W_dec_e^T f_e + b_dec
    L     = E|x - x_hat|^2 / Var(x)  +  alpha L_aux  +  beta (E sum_e share_e mean p_e - 1)

With `selection: batch` f_e is relu(z) where that is among the (rows * k) largest of the global
batch, over all experts, and at inference where z > theta (batchtopk.py).

share_e is the part of the global batch's rows that goes to e, so the last term is 0 when all get as
many. With one expert p is 1, and this is TopK or BatchTopK. AuxK's dead latents see the errors of
the rows that come to their expert, with p held fixed: what they learn is no reason to route
elsewhere.

Experts are neighbouring latents, `n_latents / experts` each, so a shard holds whole experts.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dist_sae.config.sae import RoutedConfig
from dist_sae.dictionaries.auxk import auxk_loss
from dist_sae.dictionaries.axis import WHOLE, LatentAxis
from dist_sae.dictionaries.base import (
    Codes,
    Dictionary,
    Inferred,
    LossTerms,
    Output,
    Routing,
    Rows,
    Slots,
    StepContext,
    firings,
)
from dist_sae.dictionaries.init import first_rows, initialise_tied, random_rows, rescale_encoder
from dist_sae.dictionaries.recipes.batchtopk import BatchTopK
from dist_sae.dictionaries.schedules import annealed
from dist_sae.kernels import Entries, select
from dist_sae.kernels.keys import NOTHING
from dist_sae.kernels.select import Block

_BALANCING_STEPS = 200  # of the initial router, on the first batch
_ROUTER_SEED = 1  # beside the dictionary's


class Route(NamedTuple):
    """Where rows go."""

    p: Float[Tensor, "rows experts"]
    experts: Int[Tensor, "rows chosen"]
    gates: Float[Tensor, "rows chosen"]
    """g."""


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
        self._by_expert: Tensor | None = None  # they arrive by rank, then by expert
        if axis.shards > 1:
            numbers = torch.arange(per_shard, device=flat.device).repeat(axis.shards)
            self._by_expert = numbers.repeat_interleave(counts.flatten()).argsort(stable=True)

    def there(self, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "arrived d_in"]:
        """Rows at this shard's experts, one expert after the other; no gradient."""
        sent = x.index_select(0, self._order // self._chosen)
        rows = self._axis.exchange(sent, self._sent, self._received)
        return rows if self._by_expert is None else rows.index_select(0, self._by_expert)

    def back(self, parts: Float[Tensor, "arrived d_in"]) -> Float[Tensor, "rows chosen d_in"]:
        """What experts made of this rank's rows; its gradient goes there."""
        if self._by_expert is not None:
            parts = _put_back(parts, self._by_expert)
        returned = self._axis.exchange(parts, self._received, self._sent)
        return _put_back(returned, self._order).view(-1, self._chosen, parts.shape[1])


class _PutBack(torch.autograd.Function):
    """Undoes `x[order]`; the gradient is taken in that order, where indexing would sum it up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor) -> Tensor:
        ctx.order = order
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        return x.index_select(0, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.index_select(0, ctx.order), None


def _put_back(x: Tensor, order: Tensor) -> Tensor:
    result: Tensor = _PutBack.apply(x, order)  # type: ignore[no-untyped-call]
    return result


class Routed(BatchTopK):
    """TopK or BatchTopK in what it does with latents; which a row meets is the router's choice."""

    config: RoutedConfig
    balance: Float[Tensor, " experts"]
    """Added to log p where experts are chosen; only balancing by bias changes it."""
    shared = ("b_dec", "W_router", "b_router")

    def __init__(self, config: RoutedConfig, d_in: int, *place: Any, **precision: Any) -> None:
        super().__init__(config, d_in, *place, **precision)
        self.W_router = nn.Parameter(self.b_dec.new_zeros(config.experts, d_in))
        self.b_router = nn.Parameter(self.b_dec.new_zeros(config.experts))
        self.register_buffer("balance", self.b_dec.new_zeros(config.experts))

    @property
    def width(self) -> int:
        """Latents of an expert."""
        return self.n_latents // self.config.experts

    def route(self, centred: Float[Tensor, "rows d_in"], axis: LatentAxis = WHOLE) -> Route:
        """Choose each row's experts; with the replica's axis, gradients are of all its rows."""
        logits = centred @ axis.replicated(self.W_router).T + axis.replicated(self.b_router)
        log_p = logits.log_softmax(1)  # p itself may be 0 where a bias sends a row
        wanted = log_p.detach() + self.balance
        experts = wanted.topk(self.config.experts_per_row, dim=1).indices
        log_gates = log_p.gather(1, experts)
        if self.config.gate == "straight_through":
            log_gates = log_gates - log_gates.detach().logsumexp(1, keepdim=True)
        return Route(log_p.exp(), experts, log_gates.exp())

    def objective(self, rows: Rows, context: StepContext) -> Output:
        config, axis = self.config, self.axis
        k = annealed(context.progress, config.k, config.k_start, config.k_anneal_share)
        centre, b_dec = self.biases()
        centred = (rows.inputs - centre).detach()
        route = self.route(centred, axis)
        trip = Trip(axis, route.experts, config.experts)
        arrived = trip.there(centred)
        replica_rows = len(centred) * axis.shards
        limit = self._limit(replica_rows)
        if config.selection == "row":
            selected = [self._select(arrived, trip.arrived, k, limit=limit)]
        else:
            sent = replica_rows * config.experts_per_row
            blocks = self._blocks(arrived, trip.arrived, self.product_dtype, limit=limit)
            count = k * replica_rows * axis.replicas
            selected = [self.largest_of_all(blocks, count, len(arrived), sent)]
        if config.auxk and context.n_dead:
            selected.append(self._select(arrived, trip.arrived, config.auxk, among=context.dead))
        (acts, parts), *aux = self.reconstruct(selected, arrived, centre)
        error = rows.targets - (_mixed(route.gates, trip.back(parts)) + b_dec)
        fvu = error.square().sum() / (replica_rows * context.variance)
        auxk = fvu.new_zeros(())
        for _, parts in aux:
            e_hat = _mixed(route.gates.detach(), trip.back(parts))
            auxk = auxk_loss(axis, rows.targets, error.detach(), e_hat)
        load = axis.total(trip.load)
        penalty = self._imbalance(load, route.p) / replica_rows
        if config.balance == "bias" and self.training:
            self.balance += config.balance_rate * (load.double().mean() - load).sign()
        total = fvu + config.auxk_coefficient * auxk + penalty
        dropped = sum(max(0, n - limit) for n in trip.arrived) if limit is not None else 0
        return Output(
            LossTerms(fvu, auxk, penalty, total),
            firings(acts, selected[0][1]),
            (acts > 0).sum(),
            error.detach(),
            Routing(load, dropped),
        )

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "batch d_in"]) -> Codes:
        """Every shard looks at all of the replica's rows, and computes those that come to it."""
        centred = self.axis.gather(x) - self.biases()[0]
        rows, gates, arrived = self._come_here(centred)
        dtype = self.W_enc.dtype
        if self.config.selection == "row":
            pre_acts, entries = self._select(
                centred[rows], arrived, self.config.k, product_dtype=dtype
            )
            found = select.Candidates(pre_acts.relu(), entries.rows, entries.latents)
        else:
            blocks = self._blocks(centred[rows], arrived, dtype)
            above = select.above(blocks, self.b_enc, self.bound)
            assert above is not None  # there was no limit
            found = above
        acts = found.values * gates[found.rows]
        found = select.by_row(select.Candidates(acts, rows[found.rows], found.latents))
        return Codes(found.values, found.latents, select.starts_of(found.rows, len(centred)))

    @torch.no_grad()
    def infer(self, x: Float[Tensor, "batch d_in"]) -> Inferred:
        if self.config.selection == "row":
            return Dictionary.infer(self, x)
        centred = self.axis.gather(x) - self.biases()[0]
        rows, gates, arrived = self._come_here(centred)
        blocks = self._blocks(centred[rows], arrived, self.W_enc.dtype)
        parts, fired = self.decode_above(blocks, self.bound, len(rows))
        parts = torch.zeros_like(centred).index_add_(0, rows, parts.mul_(gates[:, None]))
        return Inferred(self.axis.scatter_sum(parts) + self.b_dec, fired)

    def _come_here(
        self, centred: Float[Tensor, "rows d_in"]
    ) -> tuple[Int[Tensor, " arrived"], Float[Tensor, " arrived"], list[int]]:
        """(Which of the replica's rows, their gates, how many to each) of this shard's experts."""
        route = self.route(centred)
        experts = route.experts.flatten() - self.first_latent // self.width
        n_here = len(self.W_enc) // self.width
        order = experts.argsort(stable=True)
        order = order[((experts >= 0) & (experts < n_here))[order]]
        arrived = torch.bincount(experts[order], minlength=n_here).tolist()
        return order // self.config.experts_per_row, route.gates.flatten()[order], arrived

    def initialise(self, rows: Rows, seed: int) -> None:
        initialise_tied(self, rows, seed, rescale=False)
        self._initialise_router(rows.inputs, seed)
        rescale_encoder(self, rows)

    def measure(self, rows: Rows, progress: float = 0.0) -> Float[Tensor, "batch d_out"]:
        balance = self.balance.clone()
        error = super().measure(rows, progress)
        self.balance.copy_(balance)
        return error

    def slots(self, first: int) -> Slots:
        """Each row gives its direction to its own expert's next latent."""
        assert first == 0, "routed dictionaries are not widened"
        filled = torch.zeros(self.config.experts, dtype=torch.int64, device=self.W_enc.device)

        def slots(inputs: Tensor) -> Tensor:
            experts = self.route(self._all_centred(inputs)).experts[:, 0]
            load = torch.bincount(experts, minlength=len(filled))
            order = experts.argsort(stable=True)
            places = torch.arange(len(order), device=order.device)
            places = places - (load.cumsum(0) - load)[experts[order]] + filled[experts[order]]
            latents = torch.empty_like(order)
            latents[order] = torch.where(
                places < self.width, experts[order] * self.width + places, self.n_latents
            )
            filled.add_(load)
            return latents

        return slots

    def e_hat(
        self, dead: Bool[Tensor, " n_local"], x: Float[Tensor, "batch d_in"]
    ) -> Float[Tensor, "batch d_out"]:
        centre, _ = self.biases()
        centred = x - centre
        route = self.route(centred)
        trip = Trip(self.axis, route.experts, self.config.experts)
        rows = trip.there(centred)
        selected = self._select(rows, trip.arrived, self.config.auxk, among=dead)
        [(_, parts)] = self.reconstruct([selected], rows, centre)
        return _mixed(route.gates, trip.back(parts))

    def _limit(self, replica_rows: int) -> int | None:
        """The most rows of a batch that an expert computes."""
        config = self.config
        if config.capacity is None:
            return None
        return math.ceil(config.capacity * replica_rows * config.experts_per_row / config.experts)

    def _imbalance(self, load: Tensor, p: Tensor) -> Tensor:
        """The last term of the loss, times the replica's rows."""
        if self.config.balance != "loss":
            return p.new_zeros(())
        even = 1 / self.config.experts  # both sides less it: sum share p - even, without cancelling
        share = (load / load.sum() - even).to(p.dtype)
        return self.config.balance_coefficient * (share * (p - even).sum(0)).sum() / even

    @torch.no_grad()
    def _select(
        self,
        rows: Float[Tensor, "arrived d_in"],
        arrived: Sequence[int],
        k: int,
        *,
        limit: int | None = None,
        among: Bool[Tensor, " n_local"] | None = None,
        product_dtype: torch.dtype | None = None,
    ) -> tuple[Float[Tensor, " entries"], Entries]:
        """The k largest pre-activations of each row within its expert.

        Args:
            rows: Centred, those of one expert after those of the other.
            arrived: How many each expert of this shard has.
            k: Of a row, over all its experts, which have equal parts.
            limit: Of an expert's rows, the first ones; others get no entries.
            among: Latents to choose from; all if None.
            product_dtype: Precision of the product; that of training if None.
        """
        k = min(max(1, k // self.config.experts_per_row), self.width)
        product_dtype = product_dtype or self.product_dtype
        keys = torch.full((len(rows), k), NOTHING, dtype=torch.int64, device=rows.device)
        for here, latents in self._met(arrived, limit):
            keys[here] = select.topk_keys(
                rows[here],
                self.W_enc[latents],
                self.b_enc[latents],
                k,
                product_dtype,
                self.kernels,
                first=self.first_latent + latents.start,
                among=None if among is None else among[latents].nonzero()[:, 0],
            )
        return self.entries_of(keys, keys.amin(1), rows, product_dtype)

    def _blocks(
        self,
        rows: Float[Tensor, "arrived d_in"],
        arrived: Sequence[int],
        product_dtype: torch.dtype,
        *,
        limit: int | None = None,
    ) -> Iterator[Block]:
        """The products of rows with their experts' latents; arguments as of `_select`."""
        for here, latents in self._met(arrived, limit):
            for block in select.products(rows[here], self.W_enc[latents], product_dtype):
                yield block._replace(
                    rows=slice(block.rows.start + here.start, block.rows.stop + here.start),
                    latents=block.latents + latents.start,
                )

    def _met(self, arrived: Sequence[int], limit: int | None) -> Iterator[tuple[slice, slice]]:
        """Which of the arrived rows meet which of this shard's latents: expert by expert."""
        start = 0
        for expert, n in enumerate(arrived):
            stop = start + (n if limit is None else min(n, limit))
            if stop > start:
                yield slice(start, stop), slice(expert * self.width, (expert + 1) * self.width)
            start += n

    @torch.no_grad()
    def _initialise_router(self, x: Tensor, seed: int) -> None:
        """Random directions, with biases that spread the first batch evenly over the experts."""
        random_rows(self.W_router, seed + _ROUTER_SEED, 0)
        self.W_router.mul_(x.shape[1] ** -0.5)  # logits of about 1
        self.b_router.zero_()
        experts, centred = self.config.experts, self._all_centred(x)
        logits, even = centred @ self.W_router.T, len(centred) / experts
        for number in range(_BALANCING_STEPS):
            load = torch.bincount((logits + self.b_router).argmax(1), minlength=experts)
            self.b_router.sub_((load / even - 1).clamp(-1, 1) / (1 + number / 10))

    @torch.no_grad()
    def _all_centred(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "rows d_in"]:
        """The centred inputs of all ranks. Collective."""
        ranks = self.axis.replicas * self.axis.shards
        return first_rows(x, len(x) * ranks, self.axis) - self.biases()[0]


def _mixed(gates: Tensor, parts: Tensor) -> Tensor:
    """What a row's experts made of it, together."""
    if parts.shape[1] == 1:
        return gates * parts[:, 0]
    return (gates[:, :, None] * parts).sum(1)
