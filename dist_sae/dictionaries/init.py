"""Initialization from the first batches. No rank needs memory for more weights than its shard."""

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dist_sae.dictionaries.axis import LatentAxis
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.constraints import normalise_rows_
from dist_sae.dictionaries.interface import Rows

_MEDIAN_STEPS = 100
_MEDIAN_TOLERANCE = 1e-6
_FROM_DATA = 0.8  # component of a direction along data; the random part is nearly orthogonal to it
_NEW_LENGTH = 0.5  # length of a new encoder row over the mean length of known ones
_BLOCK = 1024  # latents that share a random generator; rows that are compared at once
_MAX_INTEGER = 2047  # largest integer magnitude used; TF32 represents it exactly
_STRIDE = 0x9E37_79B1  # odd, 2^32 over the golden ratio: its multiples are far apart


@torch.no_grad()
def initialise_tied(sae: Dictionary, rows: Rows, seed: int, *, rescale: bool = True) -> None:
    """Set random unit decoder rows, a tied encoder, and b_dec at the center of the data.

    b_dec is the geometric median of the targets. W_enc = c W_dec, with the c of least squared
    error. (Gao et al. 2024, app. A.1, match the lengths of rows and reconstructions instead. That
    overshoots by 1 / cos(x, x_hat): measured in docs/design.md.)

    Args:
        sae: The dictionary to initialize.
        rows: This rank's part of the first batch.
        seed: Seed of the directions.
        rescale: Whether to compute c. If False, c is 1.
    """
    random_rows(sae.W_dec, seed, sae.first_latent)
    normalise_rows_(sae.W_dec)
    sae.derive_from_directions(slice(None))
    sae.b_enc.zero_()
    sae.b_dec.copy_(geometric_median(rows.targets, sae.axis))
    if rescale:
        rescale_encoder(sae, rows)


@torch.no_grad()
def initialise_from_data(sae: Dictionary, batches: Iterable[Rows], known: int = 0) -> None:
    """Turn the directions of new latents toward data: the i-th latent toward row i.

    Call after `initialise`. The data are the recipe's `init_directions`, usually the residual. If
    all latents are new, the residual is the target minus b_dec, and the encoder is tied, with the
    same length for all rows.

    A part of each direction stays random. Language models have rows with one very large coordinate,
    which all point the same way, and latents that are copies of each other die together.
    (Anthropic, Circuits Updates, October 2025; figures in docs/design.md.) In recipes with
    `init_cosine` below 1, a row that is too similar to an earlier one is skipped, and its latent's
    direction stays random.

    Known latents keep their weights, and the rows are first reconstructed with them. New latents
    get the known latents' means for everything but their directions, and half of their mean encoder
    length. So they take part from the start without crowding out the known ones.

    Args:
        sae: The dictionary.
        batches: This rank's parts of the first batches. Over all ranks, they have a row for each
            new latent.
        known: Number of latents that were trained before. They come first.
    """
    axis, n_local = sae.axis, len(sae.W_dec)
    new = slice(min(max(known - sae.first_latent, 0), n_local), n_local)
    sae.b_enc[new] = 0
    towards, assign = torch.zeros_like(sae.directions[new]), sae.row_assigner(known)
    for rows in batches:
        directions = sae.init_directions(rows, new, all_new=not known)
        directions = first_rows(directions, len(directions) * axis.replicas * axis.shards, axis)
        places = assign(rows.inputs) - (sae.first_latent + new.start)
        blocks = (torch.split(part, _BLOCK) for part in (directions, places))
        for some, numbers in zip(*blocks, strict=True):
            ours = (numbers >= 0) & (numbers < len(towards))
            if sae.config.init_cosine < 1:
                ours &= _dissimilar(some, towards, sae.config.init_cosine, axis)
            towards[numbers[ours]] = some[ours]
    _turn_toward(sae, new, towards)
    if known:
        _match_scale(sae, slice(new.start), new)
        sae.adapt_new_latents(new, rows.inputs)
    else:
        rescale_encoder(sae, rows)


@torch.no_grad()
def reinitialise(
    sae: Dictionary,
    stuck: Bool[Tensor, " n_local"],
    x: Float[Tensor, "batch d_in"],
    directions: Float[Tensor, "batch width"],
) -> None:
    """Give dead latents new weights, similar to those of the latents active in this batch.

    The i-th dead latent turns toward row i of the global batch's `directions`. (Bricken et al.
    2023 sample rows by their loss.) A part of its old direction stays, so that no two latents are
    equal. As in a widened dictionary, it gets the active latents' mean decoder length and
    threshold, half of their mean encoder length, and few active rows. If there are more dead
    latents than rows, the rest wait for a later batch. Collective.

    Args:
        sae: The dictionary.
        stuck: Mask of this shard's dead latents.
        x: This rank's inputs.
        directions: This rank's rows to turn toward, usually its targets minus the live latents'
            reconstruction.
    """
    axis = sae.axis
    alive = axis.sum_replicas(sae.infer(x).firings) > 0
    alive |= axis.total(alive.sum()) == 0  # if none is active, all count as alive
    rows = first_rows(directions, len(directions) * axis.replicas * axis.shards, axis)
    counts = torch.zeros(axis.shards, device=x.device, dtype=torch.int64)
    counts[axis.shard] = stuck.sum()
    counts = axis.total(counts) // axis.replicas
    rows = rows[counts[: axis.shard].sum() :][: counts[axis.shard]]
    new = stuck.nonzero()[: len(rows), 0]
    _turn_toward(sae, new, rows)
    _match_scale(sae, alive, new)
    sae.adapt_new_latents(new, x)


def _dissimilar(
    rows: Float[Tensor, "rows width"],
    known: Float[Tensor, "some width"],
    bound: float,
    axis: LatentAxis,
) -> Bool[Tensor, " rows"]:
    """Select rows, in order, whose cosine with all known and all selected rows is below a bound.

    Directions are rounded to integers of 11 bits. Their products are then exact in fp32 in any
    summation order, so every sharding selects the same rows.

    Args:
        rows: Candidate rows, the same on all ranks.
        known: Known rows of this rank. A row of zeros excludes no candidate.
        bound: Bound on the cosine, above 0 and up to 1.
        axis: This rank's place.
    """

    def integers(some: Tensor) -> Tensor:
        unit = torch.nn.functional.normalize(some.float(), dim=1)
        return unit.mul_(_MAX_INTEGER).round_()

    ours, bound = integers(rows), bound * _MAX_INTEGER**2
    alike = torch.zeros(len(rows), dtype=torch.int32, device=rows.device)
    for some in torch.split(known, _BLOCK):
        alike += (ours @ integers(some).T >= bound).any(1)
    unlike = (axis.total(alike) == 0).cpu()
    for row, others in enumerate((ours @ ours.T < bound).cpu()):
        if unlike[row]:
            unlike[row + 1 :] &= others[row + 1 :]
    return unlike.to(rows.device)


def _turn_toward(sae: Dictionary, latents: slice | Tensor, towards: Tensor) -> None:
    """Turn the directions of these latents toward rows. The rows are normalized in place."""
    own = sae.directions[latents]
    normalise_rows_(own)
    normalise_rows_(towards)
    own.mul_((1 - _FROM_DATA**2) ** 0.5).add_(towards, alpha=_FROM_DATA)
    normalise_rows_(own)
    sae.directions[latents] = own
    sae.derive_from_directions(latents)


def _match_scale(sae: Dictionary, known: slice | Tensor, new: slice | Tensor) -> None:
    """Scale new rows to the known rows' mean length, and set new scalars to the known mean.

    New encoder rows get half of that length (`_NEW_LENGTH`).
    """
    for name, tensor in sae.tensors():
        if not sae.is_per_latent(name):
            continue
        is_matrix = tensor.ndim > 1
        sizes = (tensor.norm(dim=1) if is_matrix else tensor)[known]
        total, count = sae.axis.total(torch.stack([sizes.sum(), sizes.new_tensor(len(sizes))]))
        mean = total / count.clamp(min=1)
        if is_matrix:
            tensor[new] *= mean * (_NEW_LENGTH if name == "W_enc" else 1)
        else:
            tensor[new] = mean


@torch.no_grad()
def rescale_encoder(sae: Dictionary, rows: Rows) -> None:
    """Scale W_enc by the c of least squared error on these rows, with the training selection.

    The inference selection would not work: before the first step BatchTopK has no threshold, so
    half of all latents would be active. b_enc is 0, so the selection does not depend on c.
    """
    sae.set_initial_sparsity(rows.inputs)
    y, error = rows.targets - sae.b_dec, sae.measure(rows)
    sae.scale_encoder(sae.initial_length_ratio * least_squares_scale(sae.axis, y, y - error))


def least_squares_scale(
    axis: LatentAxis, y: Float[Tensor, "batch d_in"], y_hat: Float[Tensor, "batch d_in"]
) -> Float[Tensor, ""]:
    """Return the c that minimizes sum |y - c y_hat|^2 over all ranks' rows."""
    products = axis.total(torch.stack([(y * y_hat).sum(), y_hat.square().sum()]))
    return products[0] / products[1].clamp_min(torch.finfo(y.dtype).tiny)


@torch.no_grad()
def random_rows(W: Float[Tensor, "n_local d_in"], seed: int, first: int) -> None:
    """Fill a shard with its rows of a standard normal matrix of the whole dictionary.

    The rows do not depend on the sharding.

    Args:
        W: The shard's rows.
        seed: Seed of the dictionary.
        first: Number of the shard's first row.
    """
    for block in range(first // _BLOCK, -(-(first + len(W)) // _BLOCK)):
        # torch uses only 32 bits of a seed; the stride keeps different seeds' blocks distinct
        generator = torch.Generator().manual_seed((seed * _STRIDE + block) % 2**32)
        values = torch.randn(_BLOCK, W.shape[1], generator=generator)
        start, stop = block * _BLOCK - first, (block + 1) * _BLOCK - first
        W[max(start, 0) : stop] = values[max(-start, 0) : len(W) - start].to(W)


def first_rows(
    x: Float[Tensor, "batch d_in"], n: int, axis: LatentAxis
) -> Float[Tensor, "rows d_in"]:
    """Return the first `n` rows of the global batch, or all if there are fewer, on every rank."""
    start = (axis.replica * axis.shards + axis.shard) * len(x)
    rows = x.new_zeros(min(n, axis.replicas * axis.shards * len(x)), x.shape[1])
    ours = rows[start : start + len(x)]
    ours.copy_(x[: len(ours)])
    return axis.total(rows)


def geometric_median(x: Float[Tensor, "batch d_in"], axis: LatentAxis) -> Float[Tensor, " d_in"]:
    """Return the point with the least sum of distances to all ranks' rows.

    Computed by Weiszfeld's iteration.
    """
    rows = x.double()
    ones = rows.new_ones(len(rows))
    median = _weighted_mean(rows, ones, axis)
    for _ in range(_MEDIAN_STEPS):
        weights = (rows - median).norm(dim=1).clamp_min(1e-12).reciprocal()
        previous, median = median, _weighted_mean(rows, weights, axis)
        if (median - previous).norm() <= _MEDIAN_TOLERANCE * median.norm():
            break
    return median.to(x.dtype)


def mean_row(x: Float[Tensor, "batch width"], axis: LatentAxis) -> Float[Tensor, " width"]:
    """Return the mean of all ranks' rows."""
    rows = x.double()
    return _weighted_mean(rows, rows.new_ones(len(rows)), axis).to(x.dtype)


def _weighted_mean(rows: Tensor, weights: Tensor, axis: LatentAxis) -> Tensor:
    total = axis.total(torch.cat([weights @ rows, weights.sum()[None]]))
    return total[:-1] / total[-1]
