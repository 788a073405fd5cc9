"""Linear and nonlinear parts of a dictionary's error (Engels et al. 2024, arXiv:2410.14670).

The linear part e_linear of the error e = x_hat - x is what a linear map with a bias predicts from
the inputs x. The rest is the nonlinear part, with
FVU_nonlinear = sum |e - e_linear|^2 / sum |x - mean|^2. The squared norm |e|^2 is predicted in the
same way, as one number.

The maps are fitted to some rows through their second moments in fp64, d_in (d_in + d_out) numbers,
and judged on other rows. They are ridge regressions. Generalized cross-validation chooses the
penalty (Golub, Heath and Wahba 1979); 0 is among the choices.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

LEAST_ROWS = 10
"""Fewest rows per input dimension that the maps are fitted to."""
ENOUGH_ROWS = 50
"""Rows per input dimension above which the penalty hardly matters."""
_PENALTIES = (0.0, *(10.0**power for power in range(-6, 2)))
"""Ridge penalties to choose from, as shares of the mean variance of the inputs."""
_RESAMPLES = 1000


class Moments:
    """Second moments of inputs, errors and squared norms of errors, in fp64.

    Args:
        centre: Approximate mean of the inputs. Subtracting it first avoids cancellation in the
            sums.
        d_out: Width of the errors.
    """

    def __init__(self, centre: Float[Tensor, " d_in"], d_out: int) -> None:
        self._centre = centre.double()
        d_in = len(centre)
        self.rows = 0
        self._inputs = torch.zeros(d_in, d_in, dtype=torch.float64)
        self._both = torch.zeros(d_in, d_out + 1, dtype=torch.float64)
        self._squares = torch.zeros(d_out + 1, dtype=torch.float64)
        self._input_sum = torch.zeros(d_in, dtype=torch.float64)
        self._output_sum = torch.zeros(d_out + 1, dtype=torch.float64)

    def add(self, x: Float[Tensor, "rows d_in"], error: Float[Tensor, "rows d_out"]) -> None:
        """Add rows."""
        centred = x.double() - self._centre
        error = error.double()
        outputs = torch.cat([error, error.square().sum(1, keepdim=True)], 1)
        self.rows += len(x)
        self._inputs.addmm_(centred.T, centred)
        self._both.addmm_(centred.T, outputs)
        self._squares += outputs.square().sum(0)
        self._input_sum += centred.sum(0)
        self._output_sum += outputs.sum(0)

    def fit(self) -> "LinearPart":
        """Fit the maps to the rows so far.

        Raises:
            ValueError: There are fewer than `LEAST_ROWS` rows per input dimension.
        """
        n, d_in = self.rows, len(self._centre)
        if n < LEAST_ROWS * d_in:
            raise ValueError(
                f"only {n} rows to fit to; {d_in} input dimensions need at least "
                f"{LEAST_ROWS * d_in} ({LEAST_ROWS} each), better {ENOUGH_ROWS * d_in}"
            )
        input_mean, output_mean = self._input_sum / n, self._output_sum / n
        inputs = self._inputs / n - torch.outer(input_mean, input_mean)
        both = self._both / n - torch.outer(input_mean, output_mean)
        squares = (self._squares / n - output_mean.square()).clamp_min(0)
        values, vectors = torch.linalg.eigh(inputs)
        values = values.clamp_min(0)
        along = vectors.T @ both
        maps, penalties, freedom = [], [], []
        for columns in (slice(None, -1), slice(-1, None)):
            penalty = _penalty(values, along[:, columns], float(squares[columns].sum()), n)
            inverse = _inverse(values, penalty)
            maps.append(vectors @ (inverse[:, None] * along[:, columns]))
            penalties.append(penalty)
            freedom.append(_degrees_of_freedom(values, inverse))
        weights = torch.cat(maps, 1)
        centre = self._centre + input_mean
        bias = output_mean - centre @ weights
        return LinearPart(weights, bias, output_mean, tuple(penalties), tuple(freedom), n)


def _degrees_of_freedom(values: Tensor, inverse: Tensor) -> float:
    """Return a map's effective number of parameters per output, including the bias."""
    return float((values * inverse).sum()) + 1


def _inverse(values: Tensor, penalty: float) -> Tensor:
    """Return the inverse of penalized eigenvalues; 0 for eigenvalues that are rounding errors."""
    penalised = values + penalty * values.mean()
    nothing = values <= values.max() * len(values) * torch.finfo(values.dtype).eps
    return torch.where(nothing, torch.zeros_like(values), 1 / penalised.clamp_min(1e-300))


def _penalty(values: Tensor, along: Tensor, squares: float, n: int) -> float:
    """Return the one of `_PENALTIES` with the least generalized cross-validation error."""

    def score(penalty: float) -> float:
        inverse = _inverse(values, penalty)
        shrunk = values * inverse
        left = squares - float((along.square().sum(1) * inverse * (2 - shrunk)).sum())
        return max(left, 0.0) / (1 - _degrees_of_freedom(values, inverse) / n) ** 2

    return min(_PENALTIES, key=score)


class LinearPart(NamedTuple):
    """Linear maps from inputs to errors, and to their squared norms."""

    weights: Float[Tensor, "d_in d_out_1"]
    """Weights of both maps. The last column predicts the squared norm."""
    bias: Float[Tensor, " d_out_1"]
    means: Float[Tensor, " d_out_1"]
    """Mean errors and mean squared norm, over the rows that the maps are fitted to."""
    penalties: tuple[float, ...]
    """Ridge penalties of the two maps, as shares of the mean variance of the inputs."""
    degrees_of_freedom: tuple[float, ...]
    """Effective number of parameters per output of the two maps."""
    rows: int
    """Number of rows that the maps are fitted to."""

    @property
    def overfit_corrections(self) -> tuple[float, ...]:
        """Correction factors for the two maps' squared errors on rows that they were not fitted to.

        Maps that are fitted to n rows also fit the noise of these rows. So on other rows their
        squared error is about 1 / (1 - degrees of freedom / n) times that of the best maps: 2 % too
        large with 50 rows per parameter.
        """
        return tuple(1 - degrees / self.rows for degrees in self.degrees_of_freedom)

    def predict(self, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_out_1"]:
        """Predict the errors and, in the last column, their squared norms, in fp64."""
        return x.double() @ self.weights + self.bias

    def linear_error(self, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_out"]:
        """Return the linear part of the errors, in the precision of the inputs."""
        return self.predict(x)[:, :-1].to(x.dtype)


class Parts(NamedTuple):
    """How well the best linear maps would predict errors, estimated on rows outside the fit."""

    numbers: dict[str, float]
    intervals: dict[str, list[float]]
    """95 % intervals, from a bootstrap over documents. Empty if there is only one document."""
    norms: Float[Tensor, " rows"]
    """Length of each row's error, relative to the root mean square of |x - mean|."""


class PartsEvaluator:
    """Judges linear maps by sums over rows that they were not fitted to.

    Args:
        linear: The maps.
        mean: Mean of the targets over the data set, in the scale of the targets.
    """

    def __init__(self, linear: LinearPart, mean: Float[Tensor, " d_out"]) -> None:
        self._linear = linear
        self._mean = mean.double()
        self._by_row: list[Tensor] = []
        self._by_dim = torch.zeros(2, len(mean), dtype=torch.float64)

    def add(
        self,
        x: Float[Tensor, "rows d_in"],
        targets: Float[Tensor, "rows d_out"],
        error: Float[Tensor, "rows d_out"],
    ) -> None:
        """Add rows: inputs, targets, and x_hat - targets."""
        error = error.double()
        predicted = self._linear.predict(x)
        square = error.square().sum(1)
        parts, norms = self._linear.overfit_corrections
        rest = (error - predicted[:, :-1]).square() * parts
        about = (error - self._linear.means[:-1]).square()
        self._by_dim += torch.stack([rest.sum(0), about.sum(0)])
        columns = [
            (targets.double() - self._mean).square().sum(1),
            square,
            rest.sum(1),
            about.sum(1),
            (square - predicted[:, -1]).square() * norms,
            (square - self._linear.means[-1]).square(),
        ]
        self._by_row.append(torch.stack(columns, 1))

    def result(self, documents: Int[Tensor, " rows"]) -> Parts:
        """Return the results for all rows so far.

        R^2 is relative to the squares about the means of the rows that the maps were fitted to. So
        a map that predicts nothing has an R^2 of 0, or a little less.

        Args:
            documents: Document of each row.
        """
        by_row = torch.cat(self._by_row)
        _, which = torch.unique(documents, return_inverse=True)
        n = int(which.max()) + 1
        sums = torch.zeros(n, by_row.shape[1], dtype=torch.float64).index_add_(0, which, by_row)
        numbers = {name: float(x) for name, x in _shares(sums.sum(0)).items()}
        rest, about = self._by_dim
        varies = about > 0
        each = 1 - rest[varies] / about[varies]
        numbers["error_r2_mean"] = float(each.mean()) if len(each) else 0.0
        intervals = {}
        if n > 1:
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randint(n, (_RESAMPLES, n), generator=generator)
            resampled = _shares(torch.stack([sums[draw].sum(0) for draw in drawn]))
            ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
            intervals = {name: x.quantile(ends).tolist() for name, x in resampled.items()}
        norms = (by_row[:, 1] / by_row[:, 0].mean()).sqrt()
        return Parts(numbers, intervals, norms)


def _shares(sums: Float[Tensor, "*draws columns"]) -> dict[str, Tensor]:
    total, square, rest, about, norm_rest, norm_about = sums.unbind(-1)
    return {
        "fvu": square / total,
        "fvu_nonlinear": rest / total,
        "error_r2": _r2(rest, about),
        "norm_r2": _r2(norm_rest, norm_about),
    }


def _r2(rest: Tensor, about: Tensor) -> Tensor:
    """Return R^2 = 1 - rest / about; 0 where nothing varies."""
    return torch.where(about > 0, 1 - rest / about.clamp_min(1e-300), 0.0)
