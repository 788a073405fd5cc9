"""The linear and the nonlinear part of an error, against dense solutions in fp64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_sae.analysis.error_parts import LinearPart, Moments, Parts, PartsEvaluator

D_IN, D_OUT = 12, 9


def rows(n: int, seed: int) -> Tensor:
    """Return inputs with unequal variances and a mean far from 0."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(n, D_IN, generator=generator) @ torch.diag(torch.logspace(0, -2, D_IN))
    return mixed + 50


def noise(n: int, seed: int) -> Tensor:
    return torch.randn(n, D_OUT, generator=torch.Generator().manual_seed(1000 + seed))


def fit(x: Tensor, error: Tensor, centre: Tensor | None = None, piece: int = 100) -> LinearPart:
    moments = Moments(x.mean(0) if centre is None else centre, error.shape[1])
    for part in zip(torch.split(x, piece), torch.split(error, piece), strict=True):
        moments.add(*part)
    return moments.fit()


def judge(linear: LinearPart, x: Tensor, error: Tensor, documents: int = 20) -> Parts:
    targets = error.flip(0) + 3
    evaluator = PartsEvaluator(linear, targets.double().mean(0))
    for part in zip(*(torch.split(each, 64) for each in (x, targets, error)), strict=True):
        evaluator.add(*part)
    return evaluator.result(torch.arange(len(x)) % documents)


def mixed(x: Tensor, seed: int) -> Tensor:
    """Return an error with a linear part, a quadratic part and noise."""
    weights = torch.randn(D_IN, D_OUT, generator=torch.Generator().manual_seed(7))
    return (x - 50) @ weights + (x[:, :D_OUT] - 50).square() + 0.5 * noise(len(x), seed)


def test_numbers_are_those_of_a_dense_solution() -> None:
    """The numbers match an independent fp64 least-squares solution with the chosen penalty.

    The residual is corrected to that of the best possible map: times 1 - (parameters for each
    output) / (rows).
    """
    x, x_test = rows(900, 0), rows(700, 1)
    error, error_test = mixed(x, 0), mixed(x_test, 1)
    linear = fit(x, error)
    found = judge(linear, x_test, error_test)

    x64, e64 = x.double().numpy(), error.double().numpy()
    outputs = np.concatenate([e64, (e64**2).sum(1, keepdims=True)], 1)
    centred = x64 - x64.mean(0)
    weights, kept = [], []
    for columns, penalty in zip((slice(0, -1), slice(-1, None)), linear.penalties, strict=True):
        ridge = np.sqrt(penalty * centred.var(0).mean() * len(x64)) * np.eye(D_IN)
        own = outputs[:, columns] - outputs[:, columns].mean(0)
        stacked = np.concatenate([own, np.zeros((D_IN, own.shape[1]))])
        design = np.concatenate([centred, ridge])
        weights.append(np.linalg.lstsq(design, stacked, rcond=None)[0])
        again = np.concatenate([centred, 0 * ridge])
        free = 1 + np.trace(np.linalg.lstsq(design, again, rcond=None)[0])
        kept.append(1 - free / len(x64))
    t64, et64 = x_test.double().numpy(), error_test.double().numpy()
    predicted = (t64 - x64.mean(0)) @ np.concatenate(weights, 1) + outputs.mean(0)
    norms = (et64**2).sum(1)
    rest = et64 - predicted[:, :-1]
    about = et64 - outputs[:, :-1].mean(0)
    targets = et64[::-1] + 3
    total = ((targets - targets.mean(0)) ** 2).sum()
    each = 1 - kept[0] * (rest**2).sum(0) / (about**2).sum(0)
    expected = {
        "fvu": norms.sum() / total,
        "fvu_nonlinear": kept[0] * (rest**2).sum() / total,
        "error_r2": 1 - kept[0] * (rest**2).sum() / (about**2).sum(),
        "error_r2_mean": each.mean(),
        "norm_r2": 1
        - kept[1]
        * ((norms - predicted[:, -1]) ** 2).sum()
        / ((norms - outputs[:, -1].mean()) ** 2).sum(),
    }
    assert found.numbers == pytest.approx(expected, rel=1e-6)
    assert 0.1 < found.numbers["error_r2"] < 0.95  # neither part is trivial
    for name, (low, high) in found.intervals.items():
        assert low < expected[name] < high


def test_neither_pieces_nor_the_centre_change_the_maps() -> None:
    x = rows(600, 2)
    error = mixed(x, 2)
    one, other = fit(x, error, piece=600), fit(x, error, torch.full((D_IN,), 49.0), piece=7)
    assert one.penalties == other.penalties
    torch.testing.assert_close(one.weights, other.weights, rtol=1e-7, atol=1e-9)


def test_a_linear_error_is_wholly_linear() -> None:
    x, x_test = rows(900, 3), rows(300, 4)
    weights = torch.randn(D_IN, D_OUT, generator=torch.Generator().manual_seed(5))
    parts = judge(fit(x, (x - 49) @ weights), x_test, (x_test - 49) @ weights).numbers
    assert parts["error_r2"] == pytest.approx(1, abs=1e-6)
    assert parts["error_r2_mean"] == pytest.approx(1, abs=1e-6)
    assert parts["fvu_nonlinear"] < 1e-6
    assert parts["fvu"] > 0.1


def test_an_error_that_knows_nothing_of_the_inputs_has_no_linear_part() -> None:
    """Noise, or the errors of other rows, have no linear part."""
    x, x_test = rows(3000, 6), rows(3000, 7)
    shuffled = torch.randperm(3000, generator=torch.Generator().manual_seed(0))
    for error, error_test in (
        (noise(3000, 6), noise(3000, 7)),
        (mixed(x, 6)[shuffled], mixed(x_test, 7)[shuffled]),
    ):
        parts = judge(fit(x, error), x_test, error_test).numbers
        assert abs(parts["error_r2"]) < 0.01
        assert abs(parts["norm_r2"]) < 0.01
        mean = error_test.mean(0).square().sum()  # a constant is linear, since the bias fits it
        share = 1 - float(mean / error_test.square().sum(1).mean())
        assert parts["fvu_nonlinear"] == pytest.approx(share * parts["fvu"], rel=0.02)


def test_lengths_are_predicted_where_they_are_linear() -> None:
    """An error whose squared length is linear in the input is recognized by norm_r2.

    |e|^2 = 60 + x_0 - 50, in a direction drawn independently for each row.
    """

    def error(x: Tensor, seed: int) -> Tensor:
        directions = torch.nn.functional.normalize(noise(len(x), seed), dim=1)
        return directions * (10 + x[:, :1]).clamp_min(0).sqrt()

    x, x_test = rows(2000, 8), rows(2000, 9)
    parts = judge(fit(x, error(x, 8)), x_test, error(x_test, 9)).numbers
    assert parts["norm_r2"] > 0.99
    assert abs(parts["error_r2"]) < 0.02


def test_a_penalty_helps_where_rows_are_few() -> None:
    """With few rows and many weak inputs, a ridge penalty predicts better than plain least squares.

    Without a penalty the map would fit the noise.
    """
    generator = torch.Generator().manual_seed(10)
    x, x_test = (torch.randn(1500, 150, generator=generator) for _ in range(2))
    weights = 0.05 * torch.randn(150, D_OUT, generator=generator)
    error, error_test = x @ weights + noise(1500, 10), x_test @ weights + noise(1500, 11)
    linear = fit(x, error)
    found = judge(linear, x_test, error_test).numbers["error_r2"]
    plain = torch.linalg.lstsq(x - x.mean(0), error - error.mean(0)).solution
    rest = error_test - error.mean(0) - (x_test - x.mean(0)) @ plain
    about = error_test - error.mean(0)
    assert linear.penalties[0] > 0
    assert found > 1 - float(rest.square().sum() / about.square().sum())
    assert found > 0.1


def test_constant_inputs_do_no_harm() -> None:
    x, x_test = rows(900, 12), rows(300, 13)
    x[:, 3], x_test[:, 3] = 50.0, 50.0
    x[:, 4], x_test[:, 4] = x[:, 5], x_test[:, 5]
    error, error_test = (part[:, :5] @ torch.ones(5, D_OUT) for part in (x, x_test))
    parts = judge(fit(x, error), x_test, error_test).numbers
    assert parts["error_r2"] == pytest.approx(1, abs=1e-6)


def test_one_document_gives_no_intervals() -> None:
    x = rows(300, 14)
    assert judge(fit(x, mixed(x, 14)), x, mixed(x, 14), documents=1).intervals == {}


def test_too_few_rows_are_counted() -> None:
    x = rows(119, 15)
    with pytest.raises(
        ValueError, match="119 rows to fit to; 12 input dimensions need at least 120"
    ):
        fit(x, noise(119, 15))
