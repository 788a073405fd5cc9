from pathlib import Path

import pytest
import torch
from torch import Tensor

from dist_sae.data.activation_set import ActivationSet
from dist_sae.data.normaliser import measure
from dist_sae.dictionaries.normaliser import Normaliser
from dist_sae.errors import NonFiniteError
from dist_sae.producing.planner import plan
from dist_sae.storage import open_store
from tests.runs import make_run
from tests.world import RowNumbers, Wrapped, batches, fill, open_activation_set, write_unit


class Normal(RowNumbers):
    """Rows drawn from a normal distribution with mean (3, -1) and standard deviation (2, .5).

    The seed is the number of the row.
    """

    def run(self, tokens: Tensor, _: Tensor) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(int(tokens[0, 0]))
        noise = torch.randn(*tokens.shape, 2, generator=generator)
        return {"synthetic": torch.tensor([3.0, -1.0]) + noise * torch.tensor([2.0, 0.5])}


class Counting(Wrapped):
    gets = 0

    def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        self.gets += 1
        return super().get(key, start, stop)


class Constant(RowNumbers):
    def run(self, tokens: Tensor, _: Tensor) -> dict[str, Tensor]:
        return {"synthetic": torch.full((*tokens.shape, 2), 7.0)}


def test_scale_mean_and_variance_are_those_of_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The normalizer measures all training rows and no held-out rows. Scaled, E|x|^2 = d_in = 2."""
    run = make_run(tmp_path, train={"rows": 64, "batch_rows": 4})
    made = fill(run, Normal(), monkeypatch)
    activation_set = open_activation_set(run)
    normaliser = measure(activation_set, 10**9)["synthetic"]
    rows = sum(activation_set.manifest(unit).rows for unit in made.train_units)
    assert normaliser.rows == rows
    shortest = min(
        sum(activation_set.manifest(u).rows for u in made.stream_units(stream))
        for stream in range(4)
    )
    x = torch.cat(batches(activation_set, range(shortest), rows=4)).double()
    assert rows - len(x) <= 4 * 16  # batches omit only the ends of the streams
    assert float((x * normaliser.scale).square().sum(1).mean()) == pytest.approx(2, rel=0.02)
    torch.testing.assert_close(
        normaliser.mean, x.mean(0) * normaliser.scale, rtol=0.02, atol=0.02, check_dtype=True
    )
    variance = float((x - x.mean(0)).square().sum(1).mean()) * normaliser.scale**2
    assert normaliser.variance == pytest.approx(variance, rel=0.02)
    identity = float(normaliser.mean.square().sum()) + normaliser.variance
    assert identity == pytest.approx(2, rel=1e-12)  # E|x|^2 = |mean|^2 + variance


def test_only_as_many_units_are_measured_as_needed_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the first units are measured, in order, until they have enough rows.

    So training can start as soon as these units exist, and every rank measures the same ones.
    """
    run = make_run(tmp_path)
    fill(run, Normal(), monkeypatch)
    activation_set = open_activation_set(run)
    first, second = (activation_set.manifest(unit).rows for unit in (0, 1))
    for unit in range(2, 16):
        activation_set.store.delete(f"units/{unit:08d}.json")
    assert measure(activation_set, first)["synthetic"].rows == first
    assert measure(activation_set, first + 1)["synthetic"].rows == first + second


def test_constant_activations_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    fill(run, Constant(), monkeypatch)
    with pytest.raises(NonFiniteError, match="synthetic: the activations do not vary"):
        measure(open_activation_set(run), 100)


def test_each_site_has_its_own_normaliser_of_the_same_rows(tmp_path: Path) -> None:
    """Sites of different widths get their own normalizers, and each manifest is read only once."""
    run = make_run(tmp_path)
    made, store = plan(run), Counting(open_store(run.store.activations))
    acts: dict[str, list[Tensor]] = {"narrow": [], "wide": []}
    for unit in made.train_units:
        of_unit = {}
        for site, width in (("narrow", 2), ("wide", 7)):
            generator = torch.Generator().manual_seed(unit)
            of_unit[site] = 3 * width + torch.randn(5 + unit, width, generator=generator)
            acts[site].append(of_unit[site])
        write_unit(store, made, unit, of_unit)
    found = measure(ActivationSet(store, made, ("narrow", "wide")), 10**9)
    assert store.gets == len(made.train_units)
    for site, parts in acts.items():
        x = torch.cat(parts).double()
        assert found[site].rows == len(x)
        x *= found[site].scale
        assert float(x.square().sum(1).mean()) == pytest.approx(x.shape[1])
        torch.testing.assert_close(found[site].mean, x.mean(0), rtol=1e-5, atol=1e-5)
        variance = float((x - x.mean(0)).square().sum(1).mean())
        assert found[site].variance == pytest.approx(variance, rel=1e-4)
    alone = measure(ActivationSet(store, made, ("wide",)), 10**9)
    assert list(alone) == ["wide"]
    assert alone["wide"].to_scalars() == found["wide"].to_scalars()


def test_the_same_measurement_at_another_scale() -> None:
    one = Normaliser(0.5, torch.tensor([1.0, -2.0], dtype=torch.float64), 3.0, 7)
    other = one.at_scale(1.5)
    assert (other.scale, other.variance, other.rows) == (1.5, 27.0, 7)
    assert other.mean.tolist() == [3.0, -6.0]
