"""Engines: DeepSpeed matches plain torch, and neither updates the weights on a bad gradient."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_sae.config import Run, load_run
from dist_sae.deepspeed import import_deepspeed
from dist_sae.dictionaries import build_sae
from dist_sae.dictionaries.base import Dictionary
from dist_sae.dictionaries.ema import WeightAverage
from dist_sae.dictionaries.init import initialise_tied
from dist_sae.dictionaries.interface import StepContext
from dist_sae.distributed.deepspeed_keys import check_deepspeed
from dist_sae.distributed.engine import DeepSpeedEngine, Engine
from dist_sae.distributed.mesh import Mesh, join_mesh
from dist_sae.distributed.rendezvous import rendezvous
from dist_sae.distributed.zero import deepspeed_config
from dist_sae.errors import ConfigError, NonFiniteError
from dist_sae.kernels import select
from tests.dictionaries.recipes import sae_rows
from tests.runs import write_run

# importing DeepSpeed and using torch's collectives raise warnings
pytestmark = pytest.mark.filterwarnings("ignore")

CPU = {"offload_optimizer": {"device": "cpu"}}
ZERO: dict[str, dict[str, Any]] = {
    "zero-1": {"stage": 1},
    "zero-2": {"stage": 2},
    "zero-1, offloaded": {"stage": 1, **CPU},
    "zero-2, offloaded": {"stage": 2, **CPU},
}
ENGINES = ["local", "deepspeed", *ZERO]
VARIANCE = 5.0


@pytest.fixture(scope="module")  # DeepSpeed keeps its process groups for the life of the process
def mesh() -> Iterator[Mesh]:
    with rendezvous(1) as ranks, join_mesh(ranks) as mesh:
        yield mesh


def make_run(folder: Path, engine: str = "local", **train: Any) -> Run:
    deepspeed = {"zero_optimization": ZERO[engine]} if engine in ZERO else {}
    return load_run(write_run(folder, train={"deepspeed": deepspeed, **train}))


def make_sae(run: Run, x: Tensor) -> Dictionary:
    sae = build_sae(run.sae, x.shape[1])
    initialise_tied(sae, sae_rows(x), seed=0)
    return sae


def build(
    folder: Path, engine: str, mesh: Mesh, x: Tensor, **train: Any
) -> tuple[Dictionary, Engine]:
    run = make_run(folder, engine, **train)
    sae = make_sae(run, x)
    return sae, Engine(run, sae) if engine == "local" else DeepSpeedEngine(run, sae, mesh)


def batches(n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(64, 16, generator=generator) for _ in range(n)]


def now(*, some_dead: bool = True) -> StepContext:
    dead = torch.arange(64) % 3 == 0 if some_dead else torch.zeros(64, dtype=torch.bool)
    return StepContext(VARIANCE, dead, int(dead.sum()), progress=0.0)


def losses(engine: Engine, xs: list[Tensor]) -> list[float]:
    found = []
    for x in xs:
        terms = engine.objective(sae_rows(x), now()).terms
        engine.backward(terms.total)
        found += [terms.total.item(), *engine.step(lr=1e-3)]
    return found


def state(sae: Dictionary, engine: Engine) -> dict[str, Tensor]:
    """Return copies of the parameters and of Adam's moments."""
    found = {name: p.detach().clone() for name, p in sae.named_parameters()}
    for name, parameter in sae.named_parameters():
        found |= {f"{m}.{name}": engine.moment(parameter, m).clone() for m in engine.moments}
    return found


def restore(sae: Dictionary, engine: Engine, step: int, saved: Mapping[str, Tensor]) -> None:
    moments = {}
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(saved[name])
            moments[parameter] = {m: saved[f"{m}.{name}"].clone() for m in engine.moments}
    engine.restore(step, moments)


def check_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def check_close(one: Mapping[str, Tensor], other: Mapping[str, Tensor], bound: float) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert float((tensor - other[name]).norm() / tensor.norm()) <= bound, name


def gradients(sae: Dictionary, x: Tensor, step: StepContext) -> dict[str, Tensor]:
    """Compute a batch's gradients by autograd alone."""
    names, parameters = zip(*sae.named_parameters(), strict=True)
    found = torch.autograd.grad(sae.objective(sae_rows(x), step).terms.total, parameters)
    return dict(zip(names, found, strict=True))


def total_norm(gradients: Mapping[str, Tensor]) -> float:
    return float(torch.cat([g.flatten() for g in gradients.values()]).double().norm())


def test_deepspeed_and_plain_torch_give_the_same_curve(tmp_path: Path, mesh: Mesh) -> None:
    xs = batches(12)
    (local, plain), (deep, engine) = (
        build(tmp_path, kind, mesh, xs[0]) for kind in ("local", "deepspeed")
    )
    assert losses(plain, xs) == losses(engine, xs)
    check_same(state(local, plain), state(deep, engine))


@pytest.mark.system
@pytest.mark.parametrize("kind", ZERO)
def test_zero_gives_the_curve_of_plain_torch(tmp_path: Path, mesh: Mesh, kind: str) -> None:
    """The curves agree up to rounding: ZeRO sums the norm in another order, and DeepSpeed divides
    by the norm plus 1e-6.

    The sum's order changes the result by one or two fp32 ulps (6e-8). The division changes a
    clipped gradient by 1e-6 of its size. The bound of 0.45 clips most steps. Adam cancels a common
    factor of the gradients, except for its changes from step to step.
    """
    xs = batches(12)
    (local, plain), (deep, engine) = (
        build(tmp_path, one, mesh, xs[0], clip_norm=0.45) for one in ("local", kind)
    )
    curve = losses(plain, xs)
    assert sum(norm > 0.45 for norm in curve[1::2]) >= 6
    assert losses(engine, xs) == pytest.approx(curve, rel=1e-5)
    check_close(state(local, plain), state(deep, engine), 1e-5)


@pytest.mark.parametrize("kind", ZERO)
def test_zero_without_clipping_differs_in_nothing(tmp_path: Path, mesh: Mesh, kind: str) -> None:
    """Adam works elementwise, so flattening the parameters changes no bit of an update."""
    xs = batches(12)
    (local, plain), (deep, engine) = (
        build(tmp_path, one, mesh, xs[0], clip_norm=None) for one in ("local", kind)
    )
    curve = losses(plain, xs)
    found = losses(engine, xs)
    assert found[::2] == curve[::2]
    # the norms are summed in another order
    assert found[1::2] == pytest.approx(curve[1::2], rel=1e-6)
    check_same(state(local, plain), state(deep, engine))


@pytest.mark.parametrize("kind", ENGINES)
def test_an_engine_goes_on_from_what_it_gave_away(tmp_path: Path, mesh: Mesh, kind: str) -> None:
    xs = batches(10)
    sae, engine = build(tmp_path, kind, mesh, xs[0])
    losses(engine, xs[:5])
    saved = state(sae, engine)
    curve = losses(engine, xs[5:])

    again, fresh = build(tmp_path, kind, mesh, xs[1])
    restore(again, fresh, 5, saved)
    check_same(saved, state(again, fresh))
    assert losses(fresh, xs[5:]) == curve
    check_same(state(sae, engine), state(again, fresh))


@pytest.mark.parametrize("kind", ["zero-1", "zero-2"])
def test_an_engine_goes_on_where_another_stopped(tmp_path: Path, mesh: Mesh, kind: str) -> None:
    xs = batches(10)
    calm, plain = build(tmp_path, "local", mesh, xs[0], clip_norm=None)
    losses(plain, xs[:3])
    saved = state(calm, plain)
    sae, engine = build(tmp_path, kind, mesh, xs[1], clip_norm=None)
    restore(sae, engine, 3, saved)
    losses(engine, xs[3:6])
    saved = state(sae, engine)
    sae, engine = build(tmp_path, "local", mesh, xs[1], clip_norm=None)
    restore(sae, engine, 6, saved)
    losses(engine, xs[6:])
    losses(plain, xs[3:])
    check_same(state(calm, plain), state(sae, engine))


@pytest.mark.parametrize("kind", ZERO)
def test_the_constraint_holds_in_zeros_masters_too(tmp_path: Path, mesh: Mesh, kind: str) -> None:
    """DeepSpeed's fp32 masters are normalized too.

    Otherwise the next update would restore their old norms.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    xs = batches(6)
    sae, engine = build(tmp_path, kind, mesh, xs[0])
    for x in xs:
        losses(engine, [x])
        torch.testing.assert_close(sae.W_dec.detach().norm(dim=1), torch.ones(64))
        for name, parameter in sae.named_parameters():
            assert torch.equal(safe_get_full_fp32_param(parameter), parameter), name


@pytest.mark.parametrize("kind", ENGINES)
def test_products_read_the_present_encoder(
    tmp_path: Path, mesh: Mesh, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No product reads a stale bf16 copy of the encoder after a step, after another checkpoint is
    loaded, after latents are revived, or while the weight average is applied.
    """
    xs = batches(4)
    sae, engine = build(tmp_path, kind, mesh, xs[0])
    sae.product_dtype = torch.bfloat16
    average, read, products = WeightAverage(sae, decay=0.5), list[bool](), select.products

    def look(x: Tensor, W_enc: Tensor, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
        read.append(W_enc.dtype == torch.bfloat16)
        assert torch.equal(W_enc.to(dtype), sae.W_enc.to(dtype))
        return products(x, W_enc, dtype, *args, **kwargs)

    monkeypatch.setattr(select, "products", look)
    losses(engine, xs[:2])
    average.update(sae_rows(xs[0]), progress=0.5)
    losses(engine, xs[2:])
    engine.revive(now().dead, xs[3], xs[3])
    losses(engine, xs[:1])
    read.clear()
    with average.applied():
        sae.measure(sae_rows(xs[0]))
    assert not any(read)  # each product casts its own copy
    losses(engine, xs[1:2])
    saved = {name: 2 * tensor for name, tensor in state(sae, engine).items()}
    restore(sae, engine, 9, saved)
    read.clear()
    losses(engine, xs[:1])
    assert all(read) == (kind not in ZERO)


@pytest.mark.parametrize("kind", ENGINES)
def test_clipping_gives_the_update_of_gradients_clipped_by_hand(
    tmp_path: Path, mesh: Mesh, kind: str
) -> None:
    """The batches alternate between small gradients, which must not be scaled, and large ones.

    The test compares exp_avg because Adam's update hardly depends on the gradient's scale. In fp64,
    exp_avg <- b1 exp_avg + (1 - b1) g min(1, clip / |g|).
    """
    xs = [scale * x for scale, x in zip((0.5, 30, 0.4, 20), batches(4), strict=True)]
    sae, engine = build(tmp_path, kind, mesh, xs[0])
    expected = {name: torch.zeros_like(p).double() for name, p in sae.named_parameters()}
    step, norms = now(some_dead=False), list[float]()  # AuxK's gradient has a different scale
    for x in xs:
        by_hand = gradients(sae, x, step)
        norms.append(total_norm(by_hand))
        for name, gradient in by_hand.items():
            clipped = gradient.double() * min(1.0, 1 / norms[-1])
            expected[name] = 0.9 * expected[name] + 0.1 * clipped
        engine.backward(engine.objective(sae_rows(x), step).terms.total)
        assert engine.step(lr=1e-3) == [pytest.approx(norms[-1], rel=1e-5)]
    assert max(norms[0], norms[2]) < 1
    assert min(norms[1], norms[3]) > 10
    found = {name: engine.moment(p, "exp_avg").double() for name, p in sae.named_parameters()}
    check_close(expected, found, 2e-6)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("kind", ENGINES)
def test_a_gradient_that_is_not_finite_stops_before_the_update(
    tmp_path: Path, mesh: Mesh, kind: str, value: float
) -> None:
    xs = batches(2)
    sae, engine = build(tmp_path, kind, mesh, xs[0])
    losses(engine, xs)
    before = state(sae, engine)
    bad = xs[0].clone()
    bad[3, 5] = value
    engine.backward(engine.objective(sae_rows(bad), now()).terms.total)
    with pytest.raises(NonFiniteError, match="the weights are those of the previous step"):
        engine.step(lr=1e-3)
    check_same(before, state(sae, engine))


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precisions_that_keep_masters_of_their_own_are_refused(
    tmp_path: Path, mesh: Mesh, precision: str, stage: int
) -> None:
    settings = {"zero_optimization": {"stage": stage}, precision: {"enabled": True}}
    run = make_run(tmp_path, deepspeed=settings)
    with pytest.raises(ConfigError, match=rf"^train\.deepspeed\.{precision}: ") as caught:
        DeepSpeedEngine(run, make_sae(run, batches(1)[0]), mesh)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        (
            {"stage": 3},
            r"zero_optimization\.stage: 3 .* use 0, 1 or 2, and processes\.latent_shards",
        ),
        (
            {"stage": 2, "offload_optimizer": {"device": "nvme"}},
            r"offload_optimizer\.device: nvme is for stage 3 only .*; use cpu$",
        ),
    ],
)
def test_stages_that_would_do_something_else_are_refused(
    tmp_path: Path, zero: dict[str, Any], message: str
) -> None:
    run = make_run(tmp_path, deepspeed={"zero_optimization": zero})
    with pytest.raises(ConfigError, match=message) as caught:
        deepspeed_config(run)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"zero_optimisation": {"stage": 1}},
            "zero_optimisation: unknown to DeepSpeed; did you mean zero_optimization?",
        ),
        (
            {"zero_optimization": {"stage": 1, "overlap_com": True}},
            "zero_optimization.overlap_com: unknown to DeepSpeed; did you mean overlap_comm?",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            "zero_optimization.offload_optimizer.devise: unknown to DeepSpeed; did you mean "
            "device?",
        ),
        (
            {"zero_optimization": {"reduce_bucket_size": "many"}},
            "zero_optimization.reduce_bucket_size: Input should be a valid integer, unable to "
            "parse string as an integer ('many')",
        ),
        (
            {"zero_optimization": 1},
            "zero_optimization: must be a section with its own keys (got 1)",
        ),
        (
            {"zero_optimization": {"offload_optimizer": "cpu"}},
            "zero_optimization.offload_optimizer: must be a section with its own keys (got 'cpu')",
        ),
        ({"fp16": True}, "fp16: must be a section with its own keys (got True)"),
        (
            {
                "zero_optimization": {
                    "stage": 2,
                    "offload_optimizer": {"device": "cpu", "ratio": 0.5},
                }
            },
            ": Assertion failed, Partial offloading only supported for ZeRO Stage 3.",
        ),
    ],
)
def test_a_mistake_in_deepspeeds_part_is_one_line(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_deepspeed(make_run(tmp_path, deepspeed=given))
    where = "train.deepspeed" if message.startswith(":") else "train.deepspeed."
    assert str(caught.value) == f"{where}{message}"


def test_keys_that_deepspeed_knows_pass(tmp_path: Path) -> None:
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "overlap_comm": True}
    others = {"wall_clock_breakdown": True, "communication_data_type": "fp32"}
    later = {"seq_parallel_communication_data_type": "fp32", "memory_breakdown": True}
    check_deepspeed(make_run(tmp_path, deepspeed={"zero_optimization": offload} | others | later))


def test_deepspeed_never_waits_for_the_device(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's throughput timer would synchronize twice a step from the third step on."""
    from deepspeed.accelerator import get_accelerator

    waits: list[str] = []
    xs = batches(5)
    _, engine = build(tmp_path, "deepspeed", mesh, xs[0])
    monkeypatch.setattr(type(get_accelerator()), "synchronize", lambda *_: waits.append("waited"))
    losses(engine, xs)
    assert waits == []


def test_deepspeed_does_not_look_for_compilers(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search would run nvcc for each of DeepSpeed's operators, and warn if nvcc is missing."""
    deepspeed = import_deepspeed()
    from deepspeed.comm.torch import build_shm_op

    probed: list[Any] = []
    monkeypatch.setattr("deepspeed.ops.op_builder.builder.probe_is_compatible", probed.append)
    monkeypatch.delitem(vars(deepspeed.ops), "__compatible_ops__", raising=False)
    import_deepspeed()
    assert build_shm_op() is None
    xs = batches(1)
    losses(build(tmp_path, "deepspeed", mesh, xs[0])[1], xs)
    assert probed == []


def test_shards_of_state_cannot_be_saved_in_place(tmp_path: Path) -> None:
    for stage in (0, 1):
        run = make_run(tmp_path, deepspeed={"zero_optimization": {"stage": stage}})
        train = run.train.model_copy(update={"save_in_background": False})
        run = run.model_copy(update={"train": train})
        if stage:
            with pytest.raises(
                ConfigError, match=r"train\.save_in_background: false needs .*stage 0"
            ):
                deepspeed_config(run)
        else:
            deepspeed_config(run)


def test_the_launcher_must_start_as_many_ranks_as_the_run_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"processes\.trainers is 2, but WORLD_SIZE is 3"):
        rendezvous(2).__enter__()


def test_deepspeeds_configuration_follows_the_run_and_the_user(tmp_path: Path) -> None:
    path = write_run(tmp_path, train={"deepspeed": {"zero_optimization": {"stage": 1}, "x": 1}})
    config = deepspeed_config(load_run(path, ["processes.trainers=2", "train.clip_norm=0.5"]))
    assert config["train_micro_batch_size_per_gpu"] == 80  # 160 rows over 2 replicas
    assert config["zero_optimization"] == {"stage": 1}
    assert config["gradient_clipping"] == 0.5
    assert config["x"] == 1
    assert config["gradient_accumulation_steps"] == 1


@pytest.mark.parametrize(("shards", "rows"), [(1, 40), (2, 80), (4, 160)])
def test_to_deepspeed_a_replica_is_one_worker(tmp_path: Path, shards: int, rows: int) -> None:
    """160 rows are split over 4 ranks, which are 4, 2 or 1 replicas."""
    run = load_run(write_run(tmp_path, processes={"trainers": 4, "latent_shards": shards}))
    assert deepspeed_config(run)["train_micro_batch_size_per_gpu"] == rows


def test_what_the_run_file_decides_cannot_be_set_past_it(tmp_path: Path) -> None:
    """With two accumulation steps, half of the updates would be skipped silently."""
    path = write_run(tmp_path, train={"deepspeed": {"gradient_accumulation_steps": 2}})
    with pytest.raises(ConfigError, match=r"train\.deepspeed\.gradient_accumulation_steps"):
        deepspeed_config(load_run(path))
