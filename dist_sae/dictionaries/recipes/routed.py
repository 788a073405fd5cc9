"""Routed dictionaries: a row meets only the latents of a few experts (Switch SAE).

    p     = softmax(W_router (x - b_dec) + b_router)
    e     : the `experts_per_row` largest p, or (balance: bias) of log p + bias
    g_e   = p_e / stop_gradient(sum of the row's chosen p),  or (gate: probability) p_e
    f_e   = g_e relu(TopK(W_enc_e (x - b_dec) + b_enc_e))
    x_hat = sum_e W_dec_e^T f_e + b_dec
    L     = E|x - x_hat|^2 / Var(x)  +  alpha L_aux  +  beta (E sum_e share_e mean p_e - 1)

With `selection: batch`, f_e is relu(z) if that is among the (rows * k) largest of the global batch,
over all experts. At inference, f_e is relu(z) if z > theta (topk.py).

This follows Mudide et al. 2024 (arXiv:2410.08201), with AuxK added and without their dense encoder:
only the experts that a row is sent to are computed, on the rank that holds them.

share_e is the share of the global batch's rows that goes to e, so the last term is 0 if all experts
get equally many rows. With a single expert, p is 1, and this is TopK or BatchTopK. AuxK's dead
latents are trained on the errors of the rows that are sent to their expert, with p held fixed, so
that they do not change the routing.

Experts are consecutive latents, `n_latents / experts` each, so a shard contains whole experts.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dist_sae.config.sae import RoutedConfig
from dist_sae.dictionaries.auxk import WithAuxK, auxk_loss
from dist_sae.dictionaries.axis import WHOLE, LatentAxis
from dist_sae.dictionaries.base import firings
from dist_sae.dictionaries.exchange import ExpertExchange
from dist_sae.dictionaries.init import first_rows, initialise_tied, random_rows, rescale_encoder
from dist_sae.dictionaries.interface import (
    Codes,
    LossTerms,
    Output,
    Products,
    Routing,
    RowAssigner,
    Rows,
    StepContext,
    Widths,
)
from dist_sae.dictionaries.schedules import annealed
from dist_sae.dictionaries.selection import BatchTopK, RowTopK
from dist_sae.kernels import Entries, select, starts_of
from dist_sae.kernels.select import Block

_BALANCING_STEPS = 200  # iterations that balance the initial router on the first batch
_ROUTER_SEED = 1  # added to the dictionary's seed


class Route(NamedTuple):
    """Experts and gates of rows."""

    p: Float[Tensor, "rows experts"]
    experts: Int[Tensor, "rows chosen"]
    gates: Float[Tensor, "rows chosen"]
    """The gates g."""


class Routed(WithAuxK):
    """TopK or BatchTopK in which a row meets only the latents of its experts."""

    config: RoutedConfig
    balance: Float[Tensor, " experts"]
    """Bias added to log p when experts are chosen. Only `balance: bias` changes it."""
    selection: RowTopK | BatchTopK
    W_router: nn.Parameter
    b_router: nn.Parameter

    def __init__(
        self, config: RoutedConfig, widths: Widths | int, *place: Any, **precision: Any
    ) -> None:
        super().__init__(config, widths, *place, **precision)
        # registered with either selection, since all routed checkpoints contain its threshold
        by_batch = BatchTopK(self, config.threshold_decay)
        chosen = config.experts_per_row
        self.by_row = RowTopK(self, config.k, WHOLE, parts=chosen, width=self.width)
        self.selection = by_batch if config.selects_over_batch else self.by_row
        router = nn.Parameter(self.b_dec.new_zeros(config.experts, self.widths.d_in))
        self.add_tensor("W_router", router, per_latent=False)
        bias = nn.Parameter(self.b_dec.new_zeros(config.experts))
        self.add_tensor("b_router", bias, per_latent=False)
        self.add_tensor("balance", self.b_dec.new_zeros(config.experts), per_latent=False)

    @property
    def width(self) -> int:
        """Number of latents per expert."""
        return self.n_latents // self.config.experts

    def route(self, centred: Float[Tensor, "rows d_in"], axis: LatentAxis = WHOLE) -> Route:
        """Choose each row's experts. With the replica's axis, gradients are summed over it."""
        logits = centred @ axis.replicated(self.W_router).T + axis.replicated(self.b_router)
        log_p = logits.log_softmax(1)  # p may underflow to 0 for an expert chosen by its bias
        wanted = log_p.detach() + self.balance
        experts = wanted.topk(self.config.experts_per_row, dim=1).indices
        log_gates = _gather_distinct(log_p, experts)
        if self.config.gate == "straight_through":
            log_gates = log_gates - log_gates.detach().logsumexp(1, keepdim=True)
        return Route(log_p.exp(), experts, log_gates.exp())

    def objective(self, rows: Rows, context: StepContext) -> Output:
        config, axis = self.config, self.axis
        k = annealed(context.progress, config.k, config.k_start, config.k_anneal_share)
        centre, b_dec = self.biases(rows.inputs)
        centred = self.centred(rows.inputs, centre)
        route = self.route(centred, axis)
        exchange = self._exchange(route, context.dead if config.auxk and context.n_dead else None)
        arrived = exchange.dispatch(centred)
        replica_rows = len(centred) * axis.shards
        limit = self._limit(replica_rows)
        products = self._expert_products(
            arrived, exchange.arrived, self.product_dtype, replica_rows, limit=limit
        )
        selected = [self.selection.select(products, k)]
        if exchange.extra:
            dead = self._dead_products(arrived, exchange, context.dead)
            selected.append(self.by_row.select(dead, config.auxk))
        (acts, parts), *aux = self.reconstruct(selected, arrived, centre)
        error = rows.targets - (_weighted_sum(route.gates, exchange.combine(parts)) + b_dec)
        fvu = error.square().sum() / (replica_rows * context.variance)
        auxk = fvu.new_zeros(())
        for _, parts in aux:
            e_hat = _weighted_sum(route.gates.detach(), exchange.combine(parts))
            auxk = auxk_loss(axis, rows.targets, error.detach(), e_hat)
        load = axis.total(exchange.load)
        penalty = self._imbalance(load, route.p) / replica_rows
        if config.balance == "bias" and self.training:
            self.balance += config.balance_rate * (load.double().mean() - load).sign()
        total = fvu + config.auxk_coefficient * auxk + penalty
        dropped = sum(max(0, n - limit) for n in exchange.arrived) if limit is not None else 0
        return Output(
            LossTerms(fvu, auxk, penalty, total),
            firings(acts, selected[0][1]),
            (acts > 0).sum(),
            error.detach(),
            Routing(load, dropped),
        )

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "batch d_in"]) -> Codes:
        """Route all of the replica's rows, and encode those of this shard's experts."""
        centred = self.encoder_inputs(x)
        rows, gates, arrived = self._rows_sent_here(centred)
        products = self._expert_products(centred[rows], arrived, self.W_enc.dtype, len(centred))
        acts, entries = self.selection.encode(products)
        acts = acts * gates[entries.rows]
        found = select.by_row(select.Candidates(acts, rows[entries.rows], entries.latents))
        return Codes(found.values, found.latents, starts_of(found.rows, len(centred)))

    @torch.no_grad()
    def infer_shard(
        self, x: Float[Tensor, "batch d_in"]
    ) -> tuple[Float[Tensor, "rows d_out"], Int[Tensor, " n_local"]]:
        thresholds = self.inference_thresholds()
        if thresholds is None:
            return super().infer_shard(x)
        centred = self.encoder_inputs(x)
        rows, gates, arrived = self._rows_sent_here(centred)
        products = self._expert_products(centred[rows], arrived, self.W_enc.dtype, len(centred))
        parts, fired = self.decode_above(products.blocks(), thresholds, len(rows))
        in_order, order = rows.int().sort(stable=True)
        of_rows = Entries(order, starts_of(in_order, len(centred)), len(parts))
        return self.kernels.combine(gates[order], of_rows, parts), fired

    def _rows_sent_here(
        self, centred: Float[Tensor, "rows d_in"]
    ) -> tuple[Int[Tensor, " arrived"], Float[Tensor, " arrived"], list[int]]:
        """Return the rows sent to this shard's experts, their gates, and the rows per expert.

        The rows are numbered within the replica's batch.
        """
        route = self.route(centred)
        experts = route.experts.flatten() - self.first_latent // self.width
        n_here = len(self.W_enc) // self.width
        order = experts.argsort(stable=True)
        order = order[((experts >= 0) & (experts < n_here))[order]]
        arrived = torch.bincount(experts[order], minlength=n_here).tolist()
        return order // self.config.experts_per_row, route.gates.flatten()[order], arrived

    def initialise(self, rows: Rows, seed: int, *, rescale: bool = True) -> None:
        initialise_tied(self, rows, seed, rescale=False)
        self._initialise_router(rows.inputs, seed)
        if rescale:
            rescale_encoder(self, rows)

    def measure(self, rows: Rows, progress: float = 0.0) -> Float[Tensor, "batch d_out"]:
        balance = self.balance.clone()
        error = super().measure(rows, progress)
        self.balance.copy_(balance)
        return error

    def row_assigner(self, first: int) -> RowAssigner:
        """Assign each row to the next uninitialized latent of the row's first expert."""
        assert first == 0, "routed dictionaries cannot be widened"
        filled = torch.zeros(self.config.experts, dtype=torch.int64, device=self.W_enc.device)

        def assign(inputs: Tensor) -> Tensor:
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

        return assign

    def e_hat(
        self, dead: Bool[Tensor, " n_local"], x: Float[Tensor, "batch d_in"]
    ) -> Float[Tensor, "batch d_out"]:
        centred = x - self.b_dec
        route = self.route(centred)
        exchange = self._exchange(route, dead)
        rows = exchange.dispatch(centred)
        products = self._dead_products(rows, exchange, dead)
        selected = self.by_row.select(products, self.config.auxk)
        [(_, parts)] = self.reconstruct([selected], rows, None)
        return _weighted_sum(route.gates, exchange.combine(parts))

    def _exchange(self, route: Route, dead: Bool[Tensor, " n_local"] | None) -> ExpertExchange:
        """Build the exchange of rows. It also carries the experts' dead counts to the host."""
        counts = None if dead is None else dead.view(-1, self.width).sum(1)
        return ExpertExchange(self.axis, route.experts, self.config.experts, counts)

    def _limit(self, replica_rows: int) -> int | None:
        """Return the most rows of a batch that an expert computes, or None without a limit."""
        config = self.config
        if config.capacity is None:
            return None
        return math.ceil(config.capacity * replica_rows * config.experts_per_row / config.experts)

    def _imbalance(self, load: Tensor, p: Tensor) -> Tensor:
        """Compute the last term of the loss, times the replica's rows."""
        if self.config.balance != "loss":
            return p.new_zeros(())
        even = 1 / self.config.experts  # subtracted from both factors, which avoids cancellation
        share = (load / load.sum() - even).to(p.dtype)
        return self.config.balance_coefficient * (share * (p - even).sum(0)).sum() / even

    def _expert_products(
        self,
        rows: Float[Tensor, "arrived d_in"],
        arrived: Sequence[int],
        dtype: torch.dtype,
        replica_rows: int,
        *,
        limit: int | None = None,
        among: Bool[Tensor, " n_local"] | None = None,
        counts: Sequence[int] | None = None,
    ) -> Products:
        """Return the products of rows with their experts' latents.

        Args:
            rows: Centered rows, sorted by expert.
            arrived: Number of rows of each expert of this shard.
            dtype: Precision of the product.
            replica_rows: Number of rows in the replica's batch.
            limit: Capacity of an expert. Rows beyond the first `limit` meet no latents.
            among: Mask of the latents to compute. All if None.
            counts: Number of latents in the mask per expert. Required with `among`.
        """
        counts = counts or [self.width] * len(arrived)
        blocks = partial(self._expert_blocks, rows, arrived, dtype, limit, among, counts)
        computed = [n if limit is None else min(n, limit) for n in arrived]
        max_rows = replica_rows * self.config.experts_per_row
        row_groups = list(zip(computed, counts, strict=True))
        return Products(rows, dtype, blocks, replica_rows, max_rows, row_groups)

    def _dead_products(
        self,
        rows: Float[Tensor, "arrived d_in"],
        exchange: ExpertExchange,
        dead: Bool[Tensor, " n_local"],
    ) -> Products:
        place = rows, exchange.arrived, self.product_dtype, len(rows)
        return self._expert_products(*place, among=dead, counts=exchange.extra)

    def _expert_blocks(
        self,
        rows: Tensor,
        arrived: Sequence[int],
        dtype: torch.dtype,
        limit: int | None,
        among: Tensor | None,
        counts: Sequence[int],
    ) -> Iterator[Block]:
        W_enc = self.encoder_for(dtype)
        for expert, here, latents in self._expert_slices(arrived, limit):
            some = None if among is None else select.true_indices(among[latents], counts[expert])
            for block in select.products(rows[here], W_enc[latents], dtype, some):
                yield block._replace(
                    rows=slice(block.rows.start + here.start, block.rows.stop + here.start),
                    latents=block.latents + latents.start,
                )

    def _expert_slices(
        self, arrived: Sequence[int], limit: int | None
    ) -> Iterator[tuple[int, slice, slice]]:
        """Yield each expert that has rows, the slice of its rows and the slice of its latents."""
        start = 0
        for expert, n in enumerate(arrived):
            stop = start + (n if limit is None else min(n, limit))
            if stop > start:
                latents = slice(expert * self.width, (expert + 1) * self.width)
                yield expert, slice(start, stop), latents
            start += n

    @torch.no_grad()
    def _initialise_router(self, x: Tensor, seed: int) -> None:
        """Set random directions, and biases that spread the first batch evenly over the experts."""
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
        """Return the centered inputs of all ranks. Collective."""
        ranks = self.axis.replicas * self.axis.shards
        return first_rows(x, len(x) * ranks, self.axis) - self.b_dec


class _GatherDistinct(torch.autograd.Function):
    """`x.gather(1, places)`, for places that differ within a row.

    The backward pass writes each gradient to its place. torch's adds them, atomically on CUDA.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.shape = x.shape
        return x.gather(1, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.shape).scatter_(1, places, gradient), None


def _gather_distinct(
    x: Float[Tensor, "rows experts"], places: Int[Tensor, "rows chosen"]
) -> Float[Tensor, "rows chosen"]:
    result: Tensor = _GatherDistinct.apply(x, places)  # type: ignore[no-untyped-call]
    return result


def _weighted_sum(gates: Tensor, parts: Tensor) -> Tensor:
    """Sum the experts' reconstructions of each row, weighted by its gates."""
    if parts.shape[1] == 1:
        return gates * parts[:, 0]
    return (gates[:, :, None] * parts).sum(1)
