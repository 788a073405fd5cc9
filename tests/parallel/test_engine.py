"""Engines: DeepSpeed does what plain torch does, and neither updates on a bad gradient."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dist_sae.config import Run, load_run
from dist_sae.errors import ConfigError, NonFiniteError
from dist_sae.parallel.engine import DeepSpeedEngine, Engine, LocalEngine
from dist_sae.parallel.mesh import Mesh, join_mesh
from dist_sae.parallel.zero import deepspeed_config
from dist_sae.sae import build_sae
from dist_sae.sae.base import identity_sum
from dist_sae.sae.init import initialise
from dist_sae.sae.topk import TopK
from tests.launch import write_run

# DeepSpeed's import and torch's collectives warn about themselves
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return load_run(write_run(tmp_path))


@pytest.fixture(scope="module")  # DeepSpeed remembers its process groups for good
def mesh() -> Iterator[Mesh]:
    with join_mesh(1) as mesh:
        yield mesh


def make_sae(run: Run, x: Tensor) -> TopK:
    sae = build_sae(run.sae, x.shape[1])
    initialise(sae, x, seed=0, global_sum=identity_sum)
    return sae


def batches(n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(64, 16, generator=generator) for _ in range(n)]


def losses(engine: Engine, xs: list[Tensor]) -> list[float]:
    dead = torch.arange(64) % 3 == 0
    found = []
    for x in xs:
        terms = engine.objective(x, 16.0, dead, identity_sum).terms
        engine.backward(terms.total)
        found += [terms.total.item(), engine.step(lr=1e-3)]
    return found


def test_deepspeed_and_plain_torch_give_the_same_curve(run: Run, mesh: Mesh) -> None:
    xs = batches(12)
    local, deep = make_sae(run, xs[0]), make_sae(run, xs[0])
    curves = losses(LocalEngine(run, local), xs), losses(DeepSpeedEngine(run, deep, mesh), xs)
    assert curves[0] == curves[1]
    for one, other in zip(local.parameters(), deep.parameters(), strict=True):
        assert torch.equal(one, other)


def test_clipping_bounds_what_adam_sees_and_reports_the_norm_before(run: Run) -> None:
    (x,) = batches(1)
    sae = make_sae(run, x)
    engine = LocalEngine(run, sae)
    terms = engine.objective(1000 * x, 16.0, torch.zeros(64).bool(), identity_sum).terms
    engine.backward(terms.total)
    seen: list[float] = []
    engine.optimizer.register_step_pre_hook(
        lambda *_: seen.append(
            float(
                torch.nn.utils.get_total_norm(
                    [p.grad for p in sae.parameters() if p.grad is not None]
                )
            )
        )
    )
    before = engine.step(lr=1e-3)
    assert before > 1
    assert seen == [pytest.approx(1.0, rel=1e-4)]


@pytest.mark.parametrize("kind", ["local", "deepspeed"])
def test_a_gradient_that_is_not_finite_stops_before_the_update(
    run: Run, mesh: Mesh, kind: str
) -> None:
    (x,) = batches(1)
    sae = make_sae(run, x)
    engine: Engine = LocalEngine(run, sae) if kind == "local" else DeepSpeedEngine(run, sae, mesh)
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    x[3, 5] = torch.inf
    engine.backward(engine.objective(x, 16.0, torch.zeros(64).bool(), identity_sum).terms.total)
    with pytest.raises(NonFiniteError, match="the weights are those of the step before"):
        engine.step(lr=1e-3)
    for name, parameter in sae.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_settings_that_would_bypass_the_constraint_are_refused(tmp_path: Path, mesh: Mesh) -> None:
    run = load_run(write_run(tmp_path, train={"deepspeed": {"zero_optimization": {"stage": 1}}}))
    with pytest.raises(ConfigError, match=r"train\.deepspeed"):
        DeepSpeedEngine(run, make_sae(run, batches(1)[0]), mesh)


def test_the_launcher_must_start_as_many_ranks_as_the_run_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"processes\.trainers is 2, but WORLD_SIZE is 3"):
        join_mesh(2).__enter__()


def test_deepspeeds_configuration_follows_the_run_and_the_user(tmp_path: Path) -> None:
    path = write_run(tmp_path, train={"deepspeed": {"zero_optimization": {"stage": 1}, "x": 1}})
    config = deepspeed_config(load_run(path, ["processes.trainers=2"]))
    assert config["train_micro_batch_size_per_gpu"] == 80  # 160 rows over 2 ranks
    assert config["zero_optimization"] == {"stage": 1}
    assert config["x"] == 1
    assert config["gradient_accumulation_steps"] == 1


def test_what_the_run_file_decides_cannot_be_set_past_it(tmp_path: Path) -> None:
    """With two accumulation steps half of the updates would be missing, in silence."""
    path = write_run(tmp_path, train={"deepspeed": {"gradient_accumulation_steps": 2}})
    with pytest.raises(ConfigError, match=r"train\.deepspeed\.gradient_accumulation_steps"):
        deepspeed_config(load_run(path))
