"""Memory: a dictionary's full life cycle needs its state plus a bound that no width changes."""

from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

from dist_sae.checkpoint import layout
from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.checkpoint.state import TrainingState, load_weights
from dist_sae.config import Run, load_run
from dist_sae.config.sae import SaeConfig
from dist_sae.dictionaries import build_sae
from dist_sae.dictionaries.dead import DeadLatents
from dist_sae.dictionaries.init import initialise_from_data
from dist_sae.dictionaries.interface import StepContext
from dist_sae.dictionaries.metrics import Fit
from dist_sae.distributed.engine import Engine
from dist_sae.kernels.choice import choose_kernels
from dist_sae.storage import open_store
from dist_sae.training.memory import state_bytes
from tests.dictionaries.recipes import LAYERS, sae_rows, widths
from tests.memory import MIB, peak_bytes
from tests.runs import write_run

LIVES: dict[str, dict[str, object]] = {
    "topk": {"k": 16},
    "batchtopk": {"k": 16},
    "matryoshka": {"k": 16},
    "routed": {"k": 16, "experts": 2, "selection": "batch"},
    "transcoder": {"k": 16, "skip": True},
    "relu": {},
    "crosscoder": {"k": 16, "weighting": "l1", "shared_latents": 0.5},
    "crosscoder_relu": {"weighting": "l1", "shared_latents": 0.5},
    "jumprelu": {},
    "jumprelu_tanh": {},
    "gated": {},
    "clt": {"k": 16, "reads": LAYERS},
    "clt_jumprelu": {"reads": LAYERS},
}

BY_DEFAULT = ("batchtopk", "routed", "jumprelu_tanh", "gated", "crosscoder_relu", "clt")
"""One recipe for each way of using the weights. The other large ones need `--long`."""


def live(folder: Path, kind: str, n_latents: int, d_in: int, rows: int, steps: int) -> None:
    """Initialize, train, evaluate, save and load a dictionary."""
    layout.PART_BYTES = 4 * MIB
    run = life_run(folder, kind, n_latents)
    x = torch.randn(rows, d_in, generator=torch.Generator().manual_seed(0))
    kernels = choose_kernels("auto", x.device)
    checkpoints = Checkpoints(open_store(str(folder)), f"life-{n_latents}", keep=1)
    of_sites = widths(run.sae, d_in)
    sae = build_sae(run.sae, of_sites, kernels=kernels, product_dtype=torch.bfloat16)
    sae.initialise(sae_rows(x), seed=0)
    if run.sae.init_rows:
        initialise_from_data(sae, [sae_rows(x)])
    engine, dead = Engine(run, sae), DeadLatents(n_latents, 10 * rows)
    for number in range(steps):
        output = engine.objective(
            sae_rows(x), StepContext(float(d_in), dead.mask, dead.count, number / 2)
        )
        engine.backward(output.terms.total)
        engine.step(lr=1e-4)
        dead.update(output.fired, rows)
        del output
    Fit.empty(n_latents).add(x, sae.infer(x), x.mean(0))
    state = TrainingState(sae, engine, dead, None)
    checkpoints.commit(steps, [checkpoints.write(steps, state.pieces())], {})
    load_weights(sae, checkpoints.open(steps))


def life_run(folder: Path, kind: str, n_latents: int) -> Run:
    config = {"kind": kind, "n_latents": n_latents, **LIVES[kind]}
    run = load_run(write_run(folder, train={"rows": 200_000, "products": "bf16"}))
    # the sites that the recipe names need not exist
    sae: SaeConfig = TypeAdapter(SaeConfig).validate_python(config)
    return run.model_copy(update={"sae": sae})


def beyond_state(folder: Path, kind: str, n_latents: int, d_in: int, rows: int, steps: int) -> int:
    """Return the peak memory of a life cycle beyond its state (`state_bytes`), in bytes."""
    first, then = (1024, d_in, 16, steps), (n_latents, d_in, rows, steps)
    peak = peak_bytes(live, (folder, kind, *first), (folder, kind, *then))
    run = life_run(folder, kind, n_latents)
    return peak - sum(state_bytes(run, widths(run.sae, d_in)))


@pytest.mark.system
@pytest.mark.parametrize("kind", LIVES)
def test_many_rows_and_latents_need_no_matrix_of_both(tmp_path: Path, kind: str) -> None:
    """No step materializes a rows x latents matrix, even if half of all pairs are active.

    Recipes without a fixed k have half of the 256 x 65,536 pairs active. Storing these would take
    35 bytes per pair, 560 MiB. Working in chunks needs less.
    """
    assert beyond_state(tmp_path, kind, 65_536, 8, 256, steps=1) <= 180 * MIB


@pytest.mark.system
@pytest.mark.parametrize("kind", LIVES)
def test_large_weights_are_there_four_times_and_no_more(
    tmp_path: Path, kind: str, pytestconfig: pytest.Config
) -> None:
    """Peak memory is the state plus 60 MiB when a weight is 64 MiB.

    The state is the values, gradient and two moments of each weight, and W_enc in bf16.
    """
    if kind not in BY_DEFAULT and not pytestconfig.getoption("--long"):
        pytest.skip("a similar recipe is tested by default; this one needs --long")
    assert beyond_state(tmp_path, kind, 32_768, 512, 16, steps=2) <= 60 * MIB
